"""Hidden states that the head has not read yet.

The augmenting block reads the target's hidden states of a text in order, and keeps keys and values of its own. Where
drafting does not pay it reads nothing: steps are only noted here, which costs a few microseconds whatever the batch.
When a request is to be drafted for, what it has missed is read in one pass. Of much, the block reads the end alone and
sees nothing before it: a request's view of its text begins at a block of the cache, and may begin anew at a later one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import torch
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from clover_vllm.base.tensors import tensor_of
from clover_vllm.tree.budget import Ints
from clover_vllm.tree.step import Step

LEAST_IN_VIEW = 16
"""Positions that are in view where a view begins anew, at least."""


@dataclass
class AcceptedRows:
    """What the head reads in a pass: positions that are text now, request by request."""

    requests: list[int]  # [R], of the batch
    complete: set[int]  # those of them of which nothing is left to read
    hidden: torch.Tensor  # [N, (1 + target layers) D], of the target, pre-norm, in path order
    next_tokens: torch.Tensor  # int64 [N], the token behind each
    positions: torch.Tensor  # int64 [N]
    slots: torch.Tensor  # int64 [N], cache slots of those positions
    starts: list[int]  # [R + 1], first entry of each request
    skipped: list[int]  # [R], blocks of the cache before the head's view of the text
    seq_lens: list[int]  # [R], positions in view afterwards


@dataclass
class _Note:
    """A step: which of its rows are text now. Of a request they follow each other, but for accepted nodes."""

    hidden: torch.Tensor  # [rows of the step, (1 + target layers) D]
    numbers: Ints  # [R], of the batch's requests
    first: Ints  # [R], rows
    begin: Ints  # [R], positions of those rows
    end: Ints  # [R], behind the last position that is text
    moved: tuple[list[int], list[int]]  # rows of accepted nodes, and where they would follow their root


def _note(hidden: torch.Tensor, numbers: Ints, step: Step, computed: np.ndarray, rows: Ints) -> _Note:
    first = np.cumsum(rows) - rows
    if not step.has_drafts:
        return _Note(hidden, numbers, first, computed, computed + rows, ([], []))
    accepted = [len(nodes) for nodes in step.accepted]
    return _Note(hidden, numbers, first, computed, computed + rows - step.nodes + accepted, step.moves())


class _Latest:
    """Where the hidden states of positions lie that the latest step gave some requests: a short way for few rows."""

    def __init__(self, note: _Note, requests: Sequence[int], begins: Sequence[int]) -> None:
        """
        Args:
            note: of that step.
            requests: [R], of its batch.
            begins: [R], the first position of each request; none before the step's.
        """
        self._note = note
        self.rows = range(len(note.hidden))
        firsts, befores, ends = note.first.tolist(), note.begin.tolist(), note.end.tolist()
        self._spans = [
            (begin, firsts[r] + begin - befores[r], firsts[r] + ends[r] - befores[r])
            for r, begin in zip(requests, begins, strict=True)
        ]

    def spans(self) -> Iterable[tuple[int, int, int]]:
        """As `_Missed.spans`."""
        return self._spans

    def hidden(self, parts: Sequence[Iterable[int]]) -> torch.Tensor:
        """As `_Missed.hidden`."""
        rows = [*chain.from_iterable(parts)]
        sources, destinations = self._note.moved
        if sources:
            actual = dict(zip(destinations, sources, strict=True))
            rows = [actual.get(row, row) for row in rows]
        hidden = self._note.hidden
        return hidden.index_select(0, tensor_of(rows, hidden.device))


class _Missed:
    """Where the hidden states of positions lie that some requests have not read."""

    def __init__(
        self, notes: Sequence[_Note], numbers: Sequence[int], begins: Ints, ends: Ints, since: Sequence[int]
    ) -> None:
        """
        Args:
            notes: of the steps to look in, the latest last. Of a position that several have, the latest counts.
            numbers: [R], of the requests.
            begins, ends: [R], the first position of each request, and the one behind its last.
            since: [R], by request, the first of the notes that counts.
        """
        self._notes = notes
        self._begins = begins
        self._counts = np.maximum(ends - begins, 0)
        self._starts = np.cumsum(self._counts) - self._counts
        self._offsets = np.cumsum([0, *(len(note.hidden) for note in notes)])  # of each note's first row
        self.rows = np.full(self._counts.sum(), -1)  # of all notes, by request and position; -1 in a gap
        place = {number: i for i, number in enumerate(numbers)}
        known: dict[int, Ints] = {}  # notes of the same batch share their numbers
        for note in notes:
            if id(note.numbers) not in known:
                known[id(note.numbers)] = np.array([place.get(n, -1) for n in note.numbers.tolist()])
        owner = np.concatenate([known[id(note.numbers)] for note in notes])
        first = np.concatenate([note.first + base for note, base in zip(notes, self._offsets, strict=False)])
        begin = np.concatenate([note.begin for note in notes])
        end = np.concatenate([note.end for note in notes])
        of_note = np.repeat(np.arange(len(notes)), [len(note.first) for note in notes])
        low, high = np.maximum(begin, begins[owner]), np.minimum(end, ends[owner])
        used = np.flatnonzero((owner >= 0) & (low < high) & (of_note >= np.array(since)[owner]))
        owner, first, begin, low, high = (part[used] for part in (owner, first, begin, low, high))
        counts = high - low
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        places = np.repeat(self._starts[owner] + low - begins[owner], counts) + within
        self.rows[places] = np.repeat(first + low - begin, counts) + within  # in order: the latest wins

    @property
    def is_whole(self) -> bool:
        """Whether all positions were found."""
        return bool((self.rows >= 0).all())

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """By request, the first position from which on there is no gap, and where its rows stand in `rows`."""
        gaps = np.flatnonzero(self.rows < 0)
        found = zip(self._begins.tolist(), self._starts.tolist(), self._counts.tolist(), strict=True)
        for begin, first, count in found:
            own = gaps[(gaps >= first) & (gaps < first + count)] if len(gaps) else gaps
            skip = int(own[-1]) + 1 - first if len(own) else 0
            yield begin + skip, first + skip, first + count

    def hidden(self, parts: Sequence[Ints]) -> torch.Tensor:
        """Hidden states of parts of `rows`, [N, W], in one pass."""
        rows, notes, offsets = np.concatenate(parts), self._notes, self._offsets
        if any(note.moved[0] for note in notes):
            actual = np.arange(offsets[-1])
            for note, base in zip(notes, offsets, strict=False):
                sources, destinations = note.moved
                actual[base + np.array(destinations, np.int64)] = base + np.array(sources, np.int64)
            rows = actual[rows]
        if len(notes) == 1:
            source = notes[0].hidden
        else:
            # Of every note no more than what lies between the first and the last row that is read.
            of_note = np.searchsorted(offsets, rows, side="right") - 1
            local = rows - offsets[of_note]
            low, high = np.full(len(notes), offsets[-1]), np.zeros(len(notes), np.int64)
            np.minimum.at(low, of_note, local)
            np.maximum.at(high, of_note, local + 1)
            sizes = np.maximum(high - low, 0)
            source = torch.cat(
                [
                    note.hidden[a:b]
                    for note, a, b in zip(notes, low.tolist(), high.tolist(), strict=True)
                    if a < b
                ]
            )
            rows = local + (np.cumsum(sizes) - sizes - low)[of_note]
        return source.index_select(0, torch.from_numpy(rows).to(source.device))


class Backlog:
    """Notes of steps, and how far the head has read every request."""

    def __init__(self, limit: int, window: int, block_size: int, blocks: int, vocab_size: int) -> None:
        """
        Args:
            limit: most bytes of hidden states; the oldest go.
            window: positions that the head reads, the latest, of a text of which it has missed many more, from the
                nearer beginning of a block.
            block_size: cache slots per block.
            blocks: of the cache; 0 where no prefix is shared between requests.
            vocab_size: placeholders of multimodal prompts and of embeddings lie outside and are read as 0.
        """
        self._limit, self._block_size, self._vocab_size = limit, block_size, vocab_size
        self._window = window
        # Of two blocks between which the window begins, the nearer one, if enough is in view then: the later one from
        # this slot of the earlier one on.
        self._later = max(-(-block_size // 2), block_size - window + LEAST_IN_VIEW)
        self._notes: deque[_Note] = deque()
        self._dropped = 0  # notes that are gone; the oldest that is left has this number
        self._bytes = 0
        self._numbers: dict[str, int] = {}  # by request; another one when it begins again
        self._begun = 0  # numbers given
        self._batch: tuple[Sequence[str], Ints] | None = None  # names and numbers of the latest note
        self._since: dict[str, int] = {}  # by request, the first note that it has not read
        self._read: dict[str, int] = {}  # by request, the position up to which the head has read
        self._first: dict[str, int] = {}  # by request, the position at which its view begins
        self._whole = np.zeros(blocks, dtype=bool)  # blocks whose slots the head has all written

    def start(self, name: str, computed: int, block_ids: Sequence[int]) -> None:
        """A request begins, or a session goes on.

        Args:
            name: of the request.
            computed: positions that it takes from the prefix cache, or from what the session has said before.
            block_ids: of its cache.
        """
        if name in self._read:
            read = min(self._read[name], computed)
        else:
            self._numbers[name], self._begun, self._batch = self._begun, self._begun + 1, None
            self._since[name] = self._dropped + len(self._notes)
            shared = list(block_ids[: -(-computed // self._block_size)])
            known = self._whole[shared] if len(self._whole) else np.zeros(len(shared), dtype=bool)
            unknown = np.flatnonzero(~known)
            self._first[name] = int(unknown[-1] + 1) * self._block_size if len(unknown) else 0
            read = computed
        self._begin(name, read)

    def _begin(self, name: str, read: int) -> None:
        """The head has read up to here, or to where its view begins, if that is later."""
        if read < self._first[name]:
            self._first[name] = read = self._block_from(read)
        self._read[name] = read

    def _block_from(self, position: int) -> int:
        """The first position at or behind this one with which a block of the cache begins."""
        return -(-position // self._block_size) * self._block_size

    def note(
        self, hidden: torch.Tensor, names: Sequence[str], step: Step, computed: np.ndarray, table: np.ndarray
    ) -> None:
        """Remember a scored step.

        Args:
            hidden: [rows, D], the target's pre-norm hidden states; kept, so not to be written to later.
            names: of the batch's requests.
            step: what of its rows was accepted.
            computed: int [R], positions cached before the step.
            table: int [R, blocks], vLLM's block table.
        """
        rows = np.array(step.rows)
        self._notes.append(_note(hidden, self._numbers_of(names), step, computed, rows))
        self._bytes += hidden.numel() * hidden.element_size()
        while self._bytes > self._limit and len(self._notes) > 1:
            self._drop()
        if len(self._whole):
            first = -(-computed // self._block_size)
            last = (computed + rows - 1) // self._block_size
            # Blocks that the target writes from their beginning.
            for r in np.flatnonzero(first <= last).tolist():
                self._whole[table[r, first[r] : last[r] + 1]] = False

    def _numbers_of(self, names: Sequence[str]) -> Ints:
        if self._batch is None or self._batch[0] != names:
            self._batch = (names, np.array([self._numbers.get(name, -1) for name in names]))
        return self._batch[1]

    def _drop(self) -> None:
        hidden = self._notes.popleft().hidden
        self._bytes -= hidden.numel() * hidden.element_size()
        self._dropped += 1

    def forget(self, names: Iterable[str]) -> None:
        """Requests have ended, or lost their cache to a preemption."""
        for name in names:
            for known in (self._numbers, self._since, self._read, self._first):
                known.pop(name, None)

    def sweep(self) -> None:
        """Let go of notes that nobody needs any more."""
        needed = min(self._since.values(), default=self._dropped + len(self._notes))
        while self._notes and self._dropped < needed:
            self._drop()

    def pending(self, name: str, computed: int) -> int | None:
        """Positions that the head would read of a request with this many cached ones; None if it cannot so far."""
        read = self._read.get(name)
        if read is None or read > computed:
            return None
        return computed - max(read, self._view_from(read, computed))

    def missed(self, name: str, computed: int) -> int:
        """Positions of a request with this many cached ones that the head has not read; 0 of an unknown request."""
        return computed - self._read.get(name, computed)

    def _view_from(self, read: int, end: int) -> int:
        """Where the head reads on that has read up to `read` of a text of `end` positions."""
        if end - read < self._window + self._later:
            return read
        begin = end - self._window
        beyond = begin % self._block_size
        return begin - beyond + (self._block_size if beyond >= self._later else 0)

    def take(
        self,
        requests: Sequence[int],
        names: Sequence[str],
        states: Mapping[str, CachedRequestState],
        table: np.ndarray,
        most: int,
    ) -> AcceptedRows | None:
        """What some requests have not read, which counts as read from now on.

        Args:
            requests: of the batch that was noted last; one that is unknown, or has missed nothing, is left out.
            names: of that batch.
            states: of vLLM's runner.
            table: int [R, blocks], vLLM's block table.
            most: positions. What does not fit is left for the next time.
        """
        asked = [r for r in requests if names[r] in self._read]
        if not asked or not most:
            return None
        missed = self._missed(asked, [names[r] for r in asked])
        chosen: list[int] = []
        complete: set[int] = set()
        parts: list[Any] = []
        tokens: list[int] = []
        froms: list[int] = []
        counts: list[int] = []
        for r, (begin, first, last) in zip(asked, missed.spans(), strict=True):
            name = names[r]
            if begin > self._read[name]:
                self._first[name] = self._read[name] = self._block_from(begin)
            read = self._read[name]
            first += read - begin
            if last <= first or not most:
                continue
            if last - first <= most:
                complete.add(r)
                self._since[name] = self._dropped + len(self._notes)
            last = min(last, first + most)
            parts.append(missed.rows[first:last])
            chosen.append(r)
            froms.append(read)
            counts.append(last - first)
            tokens += self._tokens(states[name], read + 1, read + 1 + counts[-1])
            self._read[name] = read + counts[-1]
            most -= counts[-1]
        if not chosen:
            return None
        hidden = missed.hidden(parts)
        return self._layout(
            chosen, [names[r] for r in chosen], complete, hidden, tokens, froms, counts, table
        )

    def _missed(self, requests: Sequence[int], names: Sequence[str]) -> _Latest | _Missed:
        """What some requests of the latest note, all known, have not read and would see."""
        latest = self._notes[-1]
        ends = latest.end.tolist()
        begins = [
            max(read, self._view_from(read, ends[r]))
            for r, read in zip(requests, map(self._read.__getitem__, names), strict=True)
        ]
        befores = latest.begin.tolist()
        if all(begin >= befores[r] for r, begin in zip(requests, begins, strict=True)):
            return _Latest(latest, requests, begins)
        since = [max(0, self._since[name] - self._dropped) for name in names]
        numbers = [self._numbers[name] for name in names]
        kept = max(1, len(self._notes) - min(since))
        # A step gives a request a position or more, but for steps that were without it.
        look = min(kept, max(1, *(ends[r] - begin for r, begin in zip(requests, begins, strict=True))))
        while True:
            notes = [*islice(reversed(self._notes), look)][::-1]
            after = [place - len(self._notes) + look for place in since]
            found = _Missed(notes, numbers, np.array(begins), latest.end[requests], after)
            if look == kept or found.is_whole:
                return found
            look = kept

    def _tokens(self, state: CachedRequestState, first: int, last: int) -> list[int]:
        """Token ids at some positions of a request's text, -1 where there are none."""
        prompt, size = state.prompt_token_ids, state.num_prompt_tokens
        found: list[int] = []
        if first < size:
            own = prompt[first : min(last, size)] if prompt is not None else [-1] * (min(last, size) - first)
            found += own
        if last > size:
            found += state.output_token_ids[max(0, first - size) : last - size]
        found += [-1] * (last - first - len(found))
        return found

    def _layout(
        self,
        chosen: list[int],
        names: list[str],
        complete: set[int],
        hidden: torch.Tensor,
        tokens: list[int],
        read: list[int],
        counts: list[int],
        table: np.ndarray,
    ) -> AcceptedRows:
        sizes, firsts = np.array(counts), [self._first[name] for name in names]
        starts = [0, *accumulate(counts)]
        positions = np.arange(starts[-1]) + np.repeat(np.array(read) - starts[:-1], sizes)
        of_text, inside = np.divmod(positions, self._block_size)
        blocks = table[np.repeat(chosen, sizes), of_text].astype(np.int64)
        if len(self._whole):
            self._whole[blocks[inside == self._block_size - 1]] = True
        ids, device = np.array(tokens), hidden.device
        if min(tokens) < 0 or max(tokens) >= self._vocab_size:
            ids[(ids < 0) | (ids >= self._vocab_size)] = 0
        return AcceptedRows(
            requests=chosen,
            complete=complete,
            hidden=hidden,
            next_tokens=torch.from_numpy(ids).to(device),
            positions=torch.from_numpy(positions).to(device),
            slots=torch.from_numpy(blocks * self._block_size + inside).to(device),
            starts=starts,
            skipped=[first // self._block_size for first in firsts],
            seq_lens=[a + c - f for a, c, f in zip(read, counts, firsts, strict=True)],
        )
