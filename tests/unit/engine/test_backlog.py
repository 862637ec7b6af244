"""The head reads every position of a text once and in order, however late, or the end of it alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from clover_vllm.engine.drafting.backlog import AcceptedRows, Backlog
from clover_vllm.tree import Tree
from clover_vllm.tree.step import Step

BLOCK = 4
WIDTH = 3
"""Of a hidden state: the request's number, the position, and 1 where that is text."""
VOCAB = 1000
AMPLE = 1 << 20


@dataclass
class State:
    """What the backlog reads of vLLM's `CachedRequestState`."""

    prompt_token_ids: list[int] | None
    num_prompt_tokens: int
    output_token_ids: list[int] = field(default_factory=list)


class World:
    """A batch of requests whose texts are known, step by step."""

    def __init__(
        self, prompts: list[int], limit: int = AMPLE, blocks: int = 0, seed: int = 0, window: int = AMPLE
    ) -> None:
        """prompts: their lengths."""
        self.rng = random.Random(seed)
        self.names = [f"r{i}" for i in range(len(prompts))]
        self.texts = [[self.rng.randrange(VOCAB) for _ in range(200)] for _ in prompts]
        self.states: dict[str, Any] = {
            name: State(text[:size], size)
            for name, text, size in zip(self.names, self.texts, prompts, strict=True)
        }
        self.computed = np.zeros(len(prompts), dtype=np.int64)
        self.table = np.arange(len(prompts) * 50).reshape(len(prompts), 50) + 7
        self.backlog = Backlog(limit, window, BLOCK, blocks, VOCAB)
        self.read = [0] * len(prompts)
        self.batch = [*range(len(prompts))]  # requests of the latest step
        for r, name in enumerate(self.names):
            self.backlog.start(name, 0, self.table[r].tolist())

    def step(self, chunk: int = 5, trees: bool = True, batch: list[int] | None = None) -> None:
        """Prompts go on by a chunk, the others verify a tree of which a random path is accepted."""
        self.batch = batch if batch is not None else [*range(len(self.names))]
        made: list[Tree | None] = []
        rows: list[int] = []
        accepted: list[list[int]] = []
        hidden: list[list[float]] = []
        before = self.computed[self.batch]
        for r in self.batch:
            state, at = self.states[self.names[r]], int(self.computed[r])
            left = state.num_prompt_tokens - at
            if left > 0:
                count = min(chunk, left)
                made.append(None)
                accepted.append([])
                hidden += [[r, at + i, 1] for i in range(count)]
                rows.append(count)
                self.computed[r] += count
                if count == left:
                    self._say(r, 1)
                continue
            tree = self._tree() if trees and self.rng.random() < 0.7 else None
            path = self._path(tree)
            own: list[list[float]] = [[r, -1, 0] for _ in range(1 + (len(tree) if tree else 0))]
            own[0] = [r, at, 1]
            for depth, node in enumerate(path, start=1):
                own[1 + node] = [r, at + depth, 1]
            hidden += own
            made.append(tree)
            rows.append(len(own))
            accepted.append(path)
            self.computed[r] += 1 + len(path)
            self._say(r, 1 + len(path))
        step = Step(made, rows)
        step.accepted = accepted
        self.backlog.note(
            torch.tensor(hidden, dtype=torch.float32),
            [self.names[r] for r in self.batch],
            step,
            before,
            self.table[self.batch],
        )

    def _say(self, r: int, count: int) -> None:
        state = self.states[self.names[r]]
        at = state.num_prompt_tokens + len(state.output_token_ids)
        state.output_token_ids += self.texts[r][at : at + count]

    def _tree(self) -> Tree:
        parents = [self.rng.randrange(-1, node) for node in range(self.rng.randrange(1, 7))]
        return Tree([*range(len(parents))], parents)

    def _path(self, tree: Tree | None) -> list[int]:
        found: list[int] = []
        current = -1
        while tree is not None:
            children = [n for n, parent in enumerate(tree.parents) if parent == current]
            if not children or self.rng.random() < 0.3:
                break
            current = self.rng.choice(children)
            found.append(current)
        return found

    def pending(self, r: int) -> int | None:
        return self.backlog.pending(self.names[r], int(self.computed[r]))

    def take(self, requests: list[int], most: int = 10_000) -> AcceptedRows | None:
        """What these have not read, checked against their texts."""
        places, names = [self.batch.index(r) for r in requests], [self.names[r] for r in self.batch]
        taken = self.backlog.take(places, names, self.states, self.table[self.batch], most)
        if taken is None:
            return None
        assert taken.starts[-1] <= most
        assert len(taken.hidden) == len(taken.next_tokens) == len(taken.positions) == taken.starts[-1]
        for i, place in enumerate(taken.requests):
            r = self.batch[place]
            own = slice(taken.starts[i], taken.starts[i + 1])
            first = int(taken.positions[own][0])
            if first != self.read[r]:
                assert first == taken.skipped[i] * BLOCK > self.read[r], "the view begins anew"
                self.read[r] = first
            positions = [*range(first, first + own.stop - own.start)]
            assert taken.positions[own].tolist() == positions
            assert taken.hidden[own].tolist() == [[r, p, 1] for p in positions]
            assert taken.next_tokens[own].tolist() == [self.texts[r][p + 1] for p in positions]
            slots = [int(self.table[r, p // BLOCK]) * BLOCK + p % BLOCK for p in positions]
            assert taken.slots[own].tolist() == slots
            self.read[r] += len(positions)
            assert taken.seq_lens[i] == self.read[r] - taken.skipped[i] * BLOCK
            assert (place in taken.complete) == (self.read[r] == self.computed[r])
        return taken


@pytest.mark.parametrize("seed", range(12))
def test_every_position_is_read_once_and_in_order(seed: int) -> None:
    """Whoever is asked for, and however much of it fits a pass."""
    world = World([1, 9, 17, 30], seed=seed)
    for _ in range(25):
        world.step()
        assert all(world.pending(r) == world.computed[r] - world.read[r] for r in range(4))
        if world.rng.random() < 0.5:
            asked = sorted(world.rng.sample(range(4), world.rng.randrange(1, 5)))
            world.take(asked, world.rng.choice([1, 3, 8, 200]))
            world.backlog.sweep()
    world.take([0, 1, 2, 3])
    assert world.read == world.computed.tolist()
    assert world.take([0, 1, 2, 3]) is None, "nothing is left"


@pytest.mark.parametrize("seed", range(12))
def test_requests_that_are_without_some_steps_miss_nothing(seed: int) -> None:
    """Batches change from step to step, in their order too."""
    world = World([1, 9, 17, 30, 5], seed=seed)
    for _ in range(60):
        batch = world.rng.sample(range(5), world.rng.randrange(1, 6))
        world.step(trees=world.rng.random() < 0.5, batch=batch)
        if world.rng.random() < 0.1:
            world.take(world.rng.sample(batch, world.rng.randrange(1, len(batch) + 1)))
            world.backlog.sweep()
    world.step()
    world.take([3, 1, 0, 4, 2])
    assert world.read == world.computed.tolist()


def test_what_does_not_fit_a_pass_is_left_for_the_next() -> None:
    world = World([20, 20])
    for _ in range(4):
        world.step()
    taken = world.take([1, 0], most=25)
    assert taken is not None
    assert taken.requests == [1, 0], "in the order asked for"
    assert taken.complete == {1}
    assert world.read == [5, 20]
    taken = world.take([0, 1])
    assert taken is not None
    assert taken.requests == [0]
    assert taken.complete == {0}


def test_memory_is_bounded_and_who_loses_states_begins_with_what_is_left() -> None:
    """64 rows fit; the request that reads all the time keeps its place."""
    world = World([4, 4], limit=64 * WIDTH * 4)
    for _ in range(80):
        world.step(trees=False)
        world.take([0])
    assert world.pending(0) == 0
    taken = world.take([1])
    assert taken is not None
    assert 28 <= taken.starts[-1] <= 32
    assert world.read == world.computed.tolist()
    world.step()
    taken = world.take([0, 1])
    assert taken is not None
    assert taken.complete == {0, 1}


def test_a_window_begins_at_the_nearer_block_where_enough_is_in_view_then() -> None:
    backlog = Backlog(AMPLE, 64, 128, 0, VOCAB)
    begins = {end: backlog._view_from(0, end) for end in range(1, 2000)}
    assert all(begins[end] == 0 for end in range(1, 144))
    views = [end - begin for end, begin in begins.items() if end >= 144]
    assert all(begin % 128 == 0 for begin in begins.values())
    assert (min(views), max(views)) == (16, 143)
    assert sum(views) / len(views) < 82
    assert backlog._view_from(1000, 1143) == 1000, "what it has read before stays in view"


@pytest.mark.parametrize("window", [12, 20])
@pytest.mark.parametrize("seed", range(12))
def test_of_much_the_end_alone_is_read(seed: int, window: int) -> None:
    world = World([1, 9, 40, 70], seed=seed, window=window)
    for _ in range(30):
        world.step()
        asked = sorted(world.rng.sample(range(4), world.rng.randrange(1, 5)))
        pending = {r: world.pending(r) for r in asked}
        if world.rng.random() < 0.3:
            taken = world.take(asked)
            if taken is None:
                continue
            for i, r in enumerate(taken.requests):
                count = taken.starts[i + 1] - taken.starts[i]
                assert count < window + 2 * BLOCK
                assert count == pending[r]
            world.backlog.sweep()
    world.take([0, 1, 2, 3])
    assert world.read == world.computed.tolist()


def test_one_step_is_kept_however_large_it_is() -> None:
    world = World([40], limit=1)
    world.step(chunk=40)
    assert world.pending(0) == 40
    assert world.take([0]) is not None


def test_a_cached_prefix_that_the_head_has_not_read_is_not_seen() -> None:
    world = World([12])
    world.backlog.forget(["r0"])
    world.backlog.start("r0", 8, world.table[0].tolist())
    world.computed[0] = world.read[0] = 8
    world.step()
    taken = world.take([0])
    assert taken is not None
    assert taken.skipped == [2]
    assert taken.seq_lens == [4]


def test_a_shared_prefix_is_seen_where_the_head_has_written_its_blocks() -> None:
    """Whole blocks only, and only until the target writes them anew."""

    def seen(world: World, computed: int) -> int:
        """Positions of a prefix that the head of a new request sees."""
        world.backlog.forget(["new"])
        world.backlog.start("new", computed, world.table[0].tolist())
        return computed - world.backlog._first["new"]

    world = World([10], blocks=100)
    world.step(chunk=10)
    assert seen(world, 8) == 0, "too early"
    world.take([0])
    assert seen(world, 8) == 8
    assert world.backlog.pending("new", 8) == 0
    assert world.backlog.pending("new", 11) == 3
    assert seen(world, 12) == 0, "the third block is not full"
    world.backlog.forget(world.names)
    world.backlog.start("r0", 0, world.table[0].tolist())
    world.computed[:], world.read[:] = 0, [0]
    world.step(chunk=10)
    assert seen(world, 8) == 0, "the target has written them again"


def test_a_preempted_request_begins_again() -> None:
    world = World([6, 6])
    for _ in range(3):
        world.step()
    world.take([0])
    world.backlog.forget(["r0"])
    assert world.pending(0) is None
    world.backlog.start("r0", 0, world.table[0].tolist())
    state = world.states["r0"]
    # vLLM computes prompt and answer again, as if all were a prompt.
    state.num_prompt_tokens += len(state.output_token_ids)
    state.prompt_token_ids = world.texts[0][: state.num_prompt_tokens]
    state.output_token_ids = []
    world.computed[0] = world.read[0] = 0
    for _ in range(6):
        world.step()
    assert world.take([0, 1]) is not None
    assert world.read == world.computed.tolist()


def test_a_session_that_takes_back_what_it_said_reads_on_from_there() -> None:
    """vLLM drops the last tokens of a turn whose drafts went past its end."""
    world = World([6])
    for _ in range(4):
        world.step()
    world.take([0])
    back = int(world.computed[0]) - 2
    world.backlog.start("r0", back, world.table[0].tolist())
    assert world.backlog.pending("r0", back) == 0
    world.computed[0] = world.read[0] = back
    state = world.states["r0"]
    del state.output_token_ids[back + 1 - state.num_prompt_tokens :]
    for _ in range(3):
        world.step()
    assert world.take([0]) is not None
    assert world.read == world.computed.tolist()


def test_rows_that_were_computed_twice_count_once() -> None:
    """A step that is repeated wins over what an earlier one said of the same positions."""
    world = World([6])
    world.step(chunk=6)
    before = int(world.computed[0])
    world.step(trees=False)
    world.computed[0] = before
    del world.states["r0"].output_token_ids[1:]
    world.step(trees=False)
    assert world.take([0]) is not None
    assert world.read == world.computed.tolist()


def test_placeholders_are_read_as_token_zero() -> None:
    """Of multimodal prompts, and where a prompt was given as embeddings."""
    world = World([6])
    world.states["r0"].prompt_token_ids[3] = VOCAB + 5
    world.texts[0][3] = 0
    world.step(chunk=6)
    assert world.take([0]) is not None
    world = World([6])
    world.states["r0"].prompt_token_ids = None
    world.texts[0][:6] = [0] * 6
    world.step(chunk=6)
    assert world.take([0]) is not None


def test_notes_that_all_have_read_are_let_go() -> None:
    """The memory of a request that has ended does not count against the others."""
    world = World([4, 4], limit=40 * WIDTH * 4)
    for _ in range(12):
        world.step(trees=False)
    world.backlog.forget(["r1"])
    world.take([0])
    world.backlog.sweep()
    for _ in range(15):
        world.step(trees=False)
    assert world.pending(0) == 15
