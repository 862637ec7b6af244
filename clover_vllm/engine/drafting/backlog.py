"""Hidden states that the head has not read yet.

The augmenting block reads the target's hidden states of a text in order, and keeps keys and values of its own. Where
drafting does not pay it reads nothing: steps are only noted here, which costs a few microseconds whatever the batch.
When a request is to be drafted for, what it has missed is read in one pass. Of much, the block reads the end alone and
sees nothing before it: a request's view of its text begins at a block of the cache, and may begin anew at a later one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from clover_vllm.tree.step import Step


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
    """A step: what of its rows is text now, worked out only when somebody asks."""

    hidden: torch.Tensor  # [rows of the step, (1 + target layers) D]
    names: Sequence[str]  # of the batch
    step: Step
    computed: np.ndarray  # [R], positions cached before the step

    @cached_property
    def index(self) -> dict[str, int]:
        return {name: r for r, name in enumerate(self.names)}

    def rows(self, r: int) -> tuple[int, list[int]]:
        """First position of a request in this step, and the rows that are text, in order."""
        first, root = self.step.first_rows[r], self.step.root_rows[r]
        accepted = self.step.accepted[r] if r < len(self.step.accepted) else []
        return int(self.computed[r]), [*range(first, root + 1), *(root + 1 + node for node in accepted)]


_Rows = list[tuple[torch.Tensor, list[int]]]
"""Hidden states of steps, and which of their rows."""


def _cut(parts: _Rows, skip: int, count: int) -> _Rows:
    """Up to `count` of some steps' rows, behind those to skip."""
    found: _Rows = []
    for of, rows in parts:
        if kept := rows[skip : skip + count]:
            found.append((of, kept))
            count -= len(kept)
        skip = max(0, skip - len(rows))
    return found


class Backlog:
    """Notes of steps, and how far the head has read every request."""

    def __init__(self, limit: int, window: int, block_size: int, blocks: int, vocab_size: int) -> None:
        """
        Args:
            limit: most bytes of hidden states; the oldest go.
            window: of a text of which the head has missed more, by over a block, it reads these latest positions, and
                those before them in the same block.
            block_size: cache slots per block.
            blocks: of the cache; 0 where no prefix is shared between requests.
            vocab_size: placeholders of multimodal prompts and of embeddings lie outside and are read as 0.
        """
        self._limit, self._block_size, self._vocab_size = limit, block_size, vocab_size
        self._window = window
        self._notes: deque[_Note] = deque()
        self._dropped = 0  # notes that are gone; the oldest that is left has this number
        self._bytes = 0
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
        self._notes.append(_Note(hidden, names, step, computed))
        self._bytes += hidden.numel() * hidden.element_size()
        while self._bytes > self._limit and len(self._notes) > 1:
            self._drop()
        if len(self._whole):
            first = -(-computed // self._block_size)
            last = (computed + np.array(step.rows) - 1) // self._block_size
            for r in np.flatnonzero(
                first <= last
            ).tolist():  # blocks that the target writes from their beginning
                self._whole[table[r, first[r] : last[r] + 1]] = False

    def _drop(self) -> None:
        hidden = self._notes.popleft().hidden
        self._bytes -= hidden.numel() * hidden.element_size()
        self._dropped += 1

    def forget(self, names: Iterable[str]) -> None:
        """Requests have ended, or lost their cache to a preemption."""
        for name in names:
            for known in (self._since, self._read, self._first):
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
        if end - read <= self._window + self._block_size:
            return read
        return (end - self._window) // self._block_size * self._block_size

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
            requests: of the batch; one that is unknown, or has missed nothing, is left out.
            names: of the batch.
            states: of vLLM's runner.
            table: int [R, blocks], vLLM's block table.
            most: positions. What does not fit is left for the next time.
        """
        chosen: list[int] = []
        complete: set[int] = set()
        parts: _Rows = []
        tokens: list[int] = []
        froms: list[int] = []
        counts: list[int] = []
        last = self._dropped + len(self._notes)
        for r in requests:
            name = names[r]
            if name not in self._read or not most:
                continue
            count, missed = self._in_view(name)
            if not count:
                continue
            if count > most:
                count = most
                missed = _cut(missed, 0, most)
            else:
                complete.add(r)
                self._since[name] = last
            most -= count
            parts += missed
            chosen.append(r)
            read = self._read[name]
            froms.append(read)
            counts.append(count)
            tokens += self._tokens(states[name], read + 1, read + 1 + count)
            self._read[name] = read + count
        if not chosen:
            return None
        return self._layout(chosen, [names[r] for r in chosen], complete, parts, tokens, froms, counts, table)

    def _in_view(self, name: str) -> tuple[int, _Rows]:
        """What a request has missed, of which the view begins anew if that is much or something was never noted."""
        start, missed = self._missed(name, self._read[name], max(self._since[name], self._dropped))
        count = sum(len(rows) for _, rows in missed)
        end = start + count
        begin = max(self._view_from(self._read[name], end), start)
        if begin > self._read[name]:
            self._first[name] = self._read[name] = self._block_from(begin)
        skip = self._read[name] - start
        return max(0, count - skip), _cut(missed, skip, count)

    def _missed(self, name: str, read: int, since: int) -> tuple[int, _Rows]:
        """A request's rows in view by step, without a gap up to its latest, and their first position, `read` or later.

        A later note of a position wins.
        """
        parts: _Rows = []
        begin: int | None = None  # of the rows found so far, from the latest step back
        for i in range(len(self._notes) - 1, since - self._dropped - 1, -1):
            note = self._notes[i]
            r = note.index.get(name)
            if r is None:
                continue
            at, rows = note.rows(r)
            if begin is None:
                begin = at + len(rows)
                read = max(read, self._view_from(read, begin))
            if at + len(rows) < begin:
                break
            if at < begin:
                parts.append((note.hidden, rows[max(0, read - at) : begin - at]))
                begin = max(at, read)
            if begin <= read:
                break
        return read if begin is None else begin, parts[::-1]

    def _tokens(self, state: CachedRequestState, first: int, last: int) -> list[int]:
        """Token ids at some positions of a request's text, 0 where there are none."""
        prompt, size = state.prompt_token_ids, state.num_prompt_tokens
        found: list[int] = []
        if first < size:
            own = prompt[first : min(last, size)] if prompt is not None else [0] * (min(last, size) - first)
            found += own
        if last > size:
            found += state.output_token_ids[max(0, first - size) : last - size]
        found += [0] * (last - first - len(found))
        return [token if 0 <= token < self._vocab_size else 0 for token in found]

    def _layout(
        self,
        chosen: list[int],
        names: list[str],
        complete: set[int],
        parts: _Rows,
        tokens: list[int],
        read: list[int],
        counts: list[int],
        table: np.ndarray,
    ) -> AcceptedRows:
        latest = self._notes[-1].hidden
        if all(of is latest for of, _ in parts):  # of this step alone, as mostly
            states = latest[torch.tensor([row for _, rows in parts for row in rows]).to(latest.device)]
        else:
            states = torch.cat([of[torch.tensor(rows).to(of.device)] for of, rows in parts])
        sizes, firsts = np.array(counts), [self._first[name] for name in names]
        starts = [0, *accumulate(counts)]
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes) + np.repeat(read, sizes)
        owners = np.repeat(np.array(chosen), sizes)
        blocks = table[owners, positions // self._block_size].astype(np.int64)
        if len(self._whole):
            for r, first, count in zip(chosen, read, counts, strict=True):
                done = table[r, first // self._block_size : (first + count) // self._block_size]
                self._whole[done] = True
        device = latest.device
        return AcceptedRows(
            requests=chosen,
            complete=complete,
            hidden=states,
            next_tokens=torch.tensor(tokens).to(device),
            positions=torch.from_numpy(positions).to(device),
            slots=torch.from_numpy(blocks * self._block_size + positions % self._block_size).to(device),
            starts=starts,
            skipped=[first // self._block_size for first in firsts],
            seq_lens=[a + c - f for a, c, f in zip(read, counts, firsts, strict=True)],
        )
