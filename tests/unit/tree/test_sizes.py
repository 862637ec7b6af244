"""One size for all trees of a step, on machines that are made up."""

from __future__ import annotations

import random

import pytest

from clover_vllm.tree.sizes import Sizes, ladder_to

LADDER = ladder_to(16)


class Machine:
    """Steps take what weights or rows take, and drafting; nodes of rank k are accepted with falling chances."""

    def __init__(self, flat: float, drafting: float, chance: float, seed: int = 0) -> None:
        self.flat, self.drafting, self.chance = flat, drafting, chance
        self._rng = random.Random(seed)

    def time(self, requests: int, size: int) -> float:
        return 5.0 * max(1.0, requests * (1 + size) / self.flat) + self.drafting * (size > 0)

    def gain(self, size: int) -> float:
        return sum(self.chance * 0.75**k for k in range(size))

    def run(self, sizes: Sizes, requests: int, steps: int) -> tuple[float, list[int]]:
        """Tokens per millisecond, and what was chosen. A choice holds for the next step."""
        tokens = spent = 0.0
        chosen, size = [], 0
        for _ in range(steps):
            time = self.time(requests, size) * self._rng.uniform(0.97, 1.03)
            accepted = sum(self._rng.random() < self.gain(size) / (size or 1) for _ in range(size * requests))
            following = sizes.choose(requests)
            sizes.saw_step(requests, size, time)
            sizes.saw_drafts(requests, size, accepted)
            tokens, spent = tokens + requests + accepted, spent + time
            chosen.append(size)
            size = following
        return tokens / spent, chosen

    def best(self, requests: int) -> float:
        return max(requests * (1 + self.gain(size)) / self.time(requests, size) for size in LADDER)


def test_ladders_reach_what_is_allowed() -> None:
    assert ladder_to(1) == (0, 1)
    assert ladder_to(7) == (0, 1, 2, 4, 7)
    assert ladder_to(63) == (0, 1, 2, 4, 8, 16, 32, 63)


@pytest.mark.parametrize("requests", [1, 4, 16, 64, 256])
@pytest.mark.parametrize(("flat", "drafting", "chance"), [(256, 0.5, 0.6), (64, 1.0, 0.4), (32, 3.0, 0.2)])
def test_the_best_size_is_found_for_every_load(
    requests: int, flat: float, drafting: float, chance: float
) -> None:
    machine, sizes = Machine(flat, drafting, chance), Sizes(LADDER)
    machine.run(sizes, requests, 300)
    rate, _ = machine.run(sizes, requests, 1500)
    assert rate > 0.96 * machine.best(requests)


def test_where_drafting_never_pays_next_to_nothing_is_lost() -> None:
    machine, sizes = Machine(flat=64, drafting=2.0, chance=0.3), Sizes(LADDER)
    machine.run(sizes, 256, 200)
    rate, chosen = machine.run(sizes, 256, 4000)
    assert rate > 0.99 * 256 / machine.time(256, 0)
    assert 0 < sum(size > 0 for size in chosen) < 40


def test_a_change_of_text_or_load_is_noticed() -> None:
    machine, sizes = Machine(flat=256, drafting=1.0, chance=0.02), Sizes(LADDER)
    _, chosen = machine.run(sizes, 8, 2000)
    assert chosen[-500:].count(0) > 450
    machine.chance = 0.7
    machine.run(sizes, 8, 1500)
    rate, _ = machine.run(sizes, 8, 500)
    assert rate > 0.95 * machine.best(8)
    machine.run(sizes, 256, 100)
    rate, _ = machine.run(sizes, 256, 500)
    assert rate > 0.95 * machine.best(256)


def test_one_slow_step_changes_nothing() -> None:
    machine, sizes = Machine(flat=256, drafting=0.5, chance=0.6), Sizes(LADDER)
    machine.run(sizes, 4, 500)
    before = {size: sizes.cost(size, 4) for size in LADDER}
    sizes.saw_step(4, 8, 5000.0)
    assert sizes.cost(8, 4) < 1.3 * before[8]


def test_steps_whose_trees_were_cut_teach_nothing() -> None:
    sizes = Sizes(LADDER)
    sizes.saw_step(1, 5, 3.0)
    assert sizes.choose(1) in LADDER
