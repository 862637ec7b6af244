"""The choice of nodes over a batch, against trying every set of trees."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clover_vllm.tree.budget import choose_budget, worths


def forests() -> st.SearchStrategy[tuple[list[int], list[int], list[float]]]:
    """Up to 8 candidates of up to 3 requests: requests, parents (-1 a root's child), chances given the parent."""

    def build(chances: list[float]) -> st.SearchStrategy[tuple[list[int], list[int], list[float]]]:
        parents = st.tuples(*(st.integers(-1, i - 1) for i in range(len(chances))))
        owners = st.tuples(*(st.integers(0, 2) for _ in chances))
        return st.tuples(parents, owners).map(lambda found: (*_inherited(*map(list, found)), chances))

    return st.lists(st.floats(0.01, 0.99), min_size=0, max_size=8).flatmap(build)


def _inherited(parents: list[int], owners: list[int]) -> tuple[list[int], list[int]]:
    for i, parent in enumerate(parents):
        if parent >= 0:
            owners[i] = owners[parent]
    return owners, parents


@settings(deadline=None)
@given(
    forests(), st.integers(3, 5), st.lists(st.floats(0.0, 3.0), min_size=9, max_size=9), st.floats(0.5, 20.0)
)
def test_no_set_of_trees_gives_a_higher_geometric_mean_of_speeds(
    forest: tuple[list[int], list[int], list[float]], sampling: int, rises: list[float], base: float
) -> None:
    owners, parents, chances = forest
    gains: list[float] = []
    for parent, chance in zip(parents, chances, strict=True):
        gains.append(chance * (1.0 if parent < 0 else gains[parent]))
    milliseconds = base + np.cumsum(rises)
    best = -math.inf
    for chosen in product((False, True), repeat=len(gains)):
        if any(c and p >= 0 and not chosen[p] for c, p in zip(chosen, parents, strict=True)):
            continue
        tokens = [1.0] * sampling
        for c, gain, owner in zip(chosen, gains, owners, strict=True):
            tokens[owner] += gain * c
        took = float(milliseconds[sum(chosen)])
        best = max(best, sum(math.log(own / took) for own in tokens) / sampling)
    order = sorted(range(len(gains)), key=lambda i: (owners[i], -gains[i], i))
    worth = worths(np.array([gains[i] for i in order]), np.array([owners[i] for i in order]))
    falling = np.argsort(-worth, kind="stable")
    found = choose_budget(worth[falling], sampling, milliseconds)
    assert found.speed == pytest.approx(best)
    kept = {order[i] for i in falling[: found.nodes]}
    assert all(parents[i] < 0 or parents[i] in kept for i in kept), "a prefix of the order is a set of trees"


def test_a_request_that_has_much_is_worth_less_of_a_further_node() -> None:
    """So an easy text does not fill the step at the cost of the hard ones."""
    found = worths(np.array([0.9, 0.9, 0.9, 0.6]), np.array([0, 0, 0, 1]))
    assert found == pytest.approx(np.log([1.9, 2.8 / 1.9, 3.7 / 2.8, 1.6]))
    assert found[1] < found[3]


def test_one_request_gets_the_most_tokens_per_millisecond() -> None:
    gains, milliseconds = np.array([0.9, 0.7, 0.4, 0.1]), np.array([10.0, 11.0, 13.0, 18.0, 19.0])
    rates = (1.0 + np.array([0.0, *np.cumsum(gains)])) / milliseconds
    found = choose_budget(worths(gains, np.zeros(4, np.int64)), 1, milliseconds)
    assert found.nodes == np.argmax(rates)
    assert math.exp(found.speed) == pytest.approx(rates.max())


def chosen(gains: list[float], sampling: int, milliseconds: np.ndarray, spent: float = 0.0) -> int:
    """Nodes, each of a request of its own."""
    worth = worths(np.array(gains), np.arange(len(gains)))
    return choose_budget(worth, sampling, milliseconds, spent).nodes


def test_nothing_is_verified_where_a_row_costs_more_than_it_earns() -> None:
    assert chosen([0.9, 0.5], 2, np.arange(2.0, 20.0)) == 0
    assert chosen([0.9, 0.5], 2, np.full(20, 10.0)) == 2


def test_what_was_spent_on_drafting_makes_further_nodes_cheaper() -> None:
    milliseconds = 10.0 + 3.0 * np.arange(20)
    assert chosen([0.9, 0.25, 0.2], 3, milliseconds) == 0
    assert chosen([0.9, 0.25, 0.2], 3, milliseconds, spent=10.0) == 1
    assert chosen([0.9, 0.25, 0.2], 3, milliseconds, spent=30.0) == 2
    assert chosen([0.9, 0.25, 0.2], 3, milliseconds, spent=200.0) == 3


def test_a_cheaper_stair_behind_an_expensive_one_is_seen() -> None:
    assert chosen([0.6] * 4, 4, np.array([10.0, 13.0, 13.0, 13.0, 13.0])) == 4
