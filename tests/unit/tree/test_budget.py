"""The choice of nodes over a batch, against trying every set of trees."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clover_vllm.tree.budget import choose_budget


def forests() -> st.SearchStrategy[tuple[list[int], list[float]]]:
    """Up to 8 candidates of a batch: parents (-1 a root's child) and chances given the parent."""

    def build(chances: list[float]) -> st.SearchStrategy[tuple[list[int], list[float]]]:
        parents = st.tuples(*(st.integers(-1, i - 1) for i in range(len(chances))))
        return parents.map(lambda found: (list(found), chances))

    return st.lists(st.floats(0.01, 0.99), min_size=0, max_size=8).flatmap(build)


@settings(deadline=None)
@given(
    forests(), st.integers(1, 4), st.lists(st.floats(0.0, 3.0), min_size=9, max_size=9), st.floats(0.5, 20.0)
)
def test_no_set_of_trees_gives_more_tokens_per_millisecond(
    forest: tuple[list[int], list[float]], sampling: int, rises: list[float], base: float
) -> None:
    parents, chances = forest
    gains: list[float] = []
    for parent, chance in zip(parents, chances, strict=True):
        gains.append(chance * (1.0 if parent < 0 else gains[parent]))
    milliseconds = base + np.cumsum(rises)
    best = 0.0
    for chosen in product((False, True), repeat=len(gains)):
        if any(c and p >= 0 and not chosen[p] for c, p in zip(chosen, parents, strict=True)):
            continue
        tokens = sampling + sum(g for g, c in zip(gains, chosen, strict=True) if c)
        best = max(best, float(tokens / milliseconds[sum(chosen)]))
    found = choose_budget(np.array(sorted(gains, reverse=True)), sampling, milliseconds)
    assert found.rate == pytest.approx(best)
    order = sorted(range(len(gains)), key=lambda i: (-gains[i], i))[: found.nodes]
    assert all(parents[i] < 0 or parents[i] in order for i in order), (
        "a prefix of the order is a set of trees"
    )


def test_nothing_is_verified_where_a_row_costs_more_than_it_earns() -> None:
    gains = np.array([0.9, 0.5])
    steep = np.arange(1.0, 20.0)
    assert choose_budget(gains, 1, steep).nodes == 0
    flat = np.full(20, 10.0)
    assert choose_budget(gains, 1, flat).nodes == 2


def test_what_was_spent_on_drafting_makes_further_nodes_cheaper() -> None:
    milliseconds = 10.0 + 3.0 * np.arange(20)
    gains = np.array([0.9, 0.25, 0.2])
    assert choose_budget(gains, 1, milliseconds).nodes == 1
    assert choose_budget(gains, 1, milliseconds, spent=30.0).nodes == 3


def test_a_cheaper_stair_behind_an_expensive_one_is_seen() -> None:
    milliseconds = np.array([10.0, 13.0, 13.0, 13.0, 13.0])
    assert choose_budget(np.full(4, 0.6), 2, milliseconds).nodes == 4
