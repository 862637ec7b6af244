"""Growing a batch's trees together: head, retrieval and both, as far as it pays."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from clover_vllm.tree import ROOT
from clover_vllm.tree.budget import Floats, Ints
from clover_vllm.tree.calibration import Calibration
from clover_vllm.tree.forest import Forest, Prices, Retrieved
from clover_vllm.tree.kinds import KINDS, SOURCE_OF, SOURCES

K = 4
Level = tuple[Floats, Ints]


class RandomHead:
    """Draws the next tokens' distribution from the path that leads there."""

    def __init__(self, requests: int, sharpness: float = 2.0) -> None:
        self._paths: list[tuple[int, ...]] = [(r,) for r in range(requests)]
        self._sharpness = sharpness
        self.levels: list[int] = []

    def _after(self, path: tuple[int, ...]) -> tuple[Floats, Ints]:
        rng = np.random.default_rng([abs(p) for p in path])
        log_probs = rng.normal(0.0, self._sharpness, 20)
        log_probs -= np.log(np.exp(log_probs).sum())
        order = np.argsort(-log_probs)[:K]
        return log_probs[order], order

    def _all(self, paths: list[tuple[int, ...]]) -> Level:
        self.levels.append(len(paths))
        found = [self._after(path) for path in paths]
        return np.array([f[0] for f in found]), np.array([f[1] for f in found])

    def first(self) -> Level:
        return self._all(self._paths)

    def expand(self, parents: Ints, tokens: Ints) -> Level:
        new = [(*self._paths[p], t) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)]
        self._paths += new
        return self._all(new)

    def joint(self, request: int, tokens: list[int]) -> float:
        path: tuple[int, ...] = (request,)
        total = 0.0
        for token in tokens:
            log_probs, order = self._after(path)
            total += log_probs[order.tolist().index(token)]
            path = (*path, token)
        return float(np.exp(total))


def forest(requests: int, limit: int = 16, room: int = 99) -> Forest:
    one = Calibration(KINDS)
    return Forest([limit] * requests, [room] * requests, [one] * requests)


def prices(row: float, level: float = 0.0, base: float = 10.0, sampling: int = 3) -> Prices:
    def of_nodes(count: int) -> Floats:
        return base + row * np.arange(count + 1.0)

    return Prices(sampling, of_nodes, lambda _: level)


def grow(found: Forest, head: RandomHead, asked: list[int], at: Prices, levels: int = 8) -> None:
    found.grow_head(head, asked, at, np.full(14, 0.8), levels)


def paths(tokens: list[int], parents: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for token, parent in zip(tokens, parents, strict=True):
        found.append([*(found[parent] if parent != ROOT else []), token])
    return found


def test_trees_hold_the_likeliest_paths_of_all_requests_parents_first() -> None:
    found, head = forest(3), RandomHead(3)
    grow(found, head, [0, 1, 2], prices(0.01))
    trees = found.trees(20)
    assert sum(map(len, trees)) == 20
    for r, tree in enumerate(trees):
        assert all(parent < node for node, parent in enumerate(tree.parents))
        assert list(tree.probabilities) == sorted(tree.probabilities, reverse=True)
        for path, gain in zip(paths(list(tree.tokens), list(tree.parents)), tree.probabilities, strict=True):
            assert gain == pytest.approx(head.joint(r, path), rel=1e-6)
        assert len(set(map(tuple, paths(list(tree.tokens), list(tree.parents))))) == len(tree)


def test_an_expensive_row_or_level_is_not_taken() -> None:
    cheap, dear, no_level = (RandomHead(2) for _ in range(3))
    for head, at in ((cheap, prices(0.01)), (dear, prices(30.0)), (no_level, prices(0.01, level=1e6))):
        grown = forest(2)
        grow(grown, head, [0, 1], at)
        if head is dear:
            assert grown.budget(at).nodes == 0
    assert len(cheap.levels) > 2
    assert no_level.levels == [2]


def test_limits_and_room_hold_per_request() -> None:
    found = Forest([2, 16], [9, 1], [Calibration(KINDS)] * 2)
    grow(found, RandomHead(2), [0, 1], prices(0.01))
    first, second = found.trees(99)
    assert len(first) == 2
    assert set(second.depths) == {1}


def test_requests_that_are_not_asked_get_no_nodes_of_the_head() -> None:
    found, head = forest(3), RandomHead(2)
    grow(found, head, [0, 2], prices(0.01))
    assert [len(tree) > 0 for tree in found.trees(30)] == [True, False, True]


def test_the_same_continuation_of_both_sources_is_one_node() -> None:
    head = RandomHead(1)
    _, order = head._after((0,))
    _, below = head._after((0, int(order[0])))
    found = forest(1)
    chain = [int(order[0]), int(below[1]), 99]
    found.retrieve({0: Retrieved(chain, [-1, 0, 1], [0.9, 0.8, 0.7], match=4)})
    before = found.nodes["gain"].copy()
    grow(found, head, [0], prices(0.01))
    tree = found.trees(40)[0]
    routes = paths(list(tree.tokens), list(tree.parents))
    assert len(set(map(tuple, routes))) == len(routes)
    sources = {tuple(route): SOURCES[SOURCE_OF[kind]] for route, kind in zip(routes, tree.kinds, strict=True)}
    assert sources[chain[0],] == "both"
    assert sources[tuple(chain[:2])] == "both"
    assert sources[tuple(chain)] == "retrieved"
    after = found.nodes["gain"][:3]
    assert all(new >= old - 1e-12 for new, old in zip(after, before, strict=True))
    parent_gains = {tuple(route): gain for route, gain in zip(routes, tree.probabilities, strict=True)}
    assert all(
        len(route) == 1 or parent_gains[route] <= parent_gains[route[:-1]] + 1e-12 for route in parent_gains
    )


def test_retrieval_alone_makes_trees() -> None:
    found = forest(2)
    found.retrieve({1: Retrieved([5, 6, 7, 8], [-1, 0, 0, 1], [0.6, 0.5, 0.1, 0.4], match=9)})
    first, second = found.trees(9)
    assert len(first) == 0
    assert sorted(paths(list(second.tokens), list(second.parents))) == [[5], [5, 6], [5, 6, 8], [5, 7]]


@pytest.mark.parametrize("spoiled", [range(K), [K - 1], [0]])
def test_a_head_that_gives_nans_drafts_nothing(spoiled: Sequence[int]) -> None:
    class Broken(RandomHead):
        def first(self) -> Level:
            log_probs, tokens = super().first()
            for i in spoiled:
                log_probs[1, i] = math.nan
            return log_probs, tokens

    found = forest(2)
    grow(found, Broken(2), [0, 1], prices(0.01))
    good, bad = found.trees(50)
    assert len(good) > 0
    assert len(bad) == 0
    assert found.spoiled == {1}


def retrieved(found: Forest, gains: dict[int, list[float]]) -> None:
    """Chains whose nodes have these gains."""
    found.retrieve(
        {
            r: Retrieved([*range(len(own))], [*range(-1, len(own) - 1)], [0.9] * len(own), 9)
            for r, own in gains.items()
        }
    )
    found.regain([gain for own in gains.values() for gain in own])


def test_a_hard_text_comes_before_the_second_node_of_an_easy_one() -> None:
    found = forest(2)
    retrieved(found, {0: [0.9, 0.8], 1: [0.5]})
    assert [len(tree) for tree in found.trees(2)] == [1, 1]
    places, worth = found.best()
    assert found.nodes["gain"][places].tolist() == [0.9, 0.5, 0.8]
    assert worth == pytest.approx(np.log([1.9, 1.5, 2.7 / 1.9]))


def test_one_easy_text_among_many_hard_ones_makes_no_step_longer() -> None:
    """By tokens per millisecond its node would pay: 0.95 of a token for 8% of a step that gives 8."""
    found = forest(8)
    retrieved(found, {0: [0.95]})
    assert found.budget(prices(row=0.9, sampling=8)).nodes == 0
    assert found.budget(prices(row=0.8, sampling=8)).nodes == 1


class EvenHead(RandomHead):
    """Four children behind every node, each with the same chance."""

    def __init__(self, requests: int, chance: float) -> None:
        super().__init__(requests)
        self._chance = chance

    def _after(self, path: tuple[int, ...]) -> tuple[Floats, Ints]:
        return np.full(K, math.log(self._chance)), np.arange(K)


@pytest.mark.parametrize(("cost", "levels"), [(4.3, 2), (4.7, 1)])
def test_a_level_is_worth_the_logarithm_of_what_it_adds(cost: float, levels: int) -> None:
    """One request, 10 ms: four nodes of 0.2 that may be followed by 0.16 each bring log(2.44 / 1.8) for 4.5 ms."""
    found, head = forest(1), EvenHead(1, 0.2)
    grow(found, head, [0], prices(0.0, level=cost * 10 * math.log(2.44 / 1.8) / 4.5, sampling=1), levels=2)
    assert len(head.levels) == levels


def test_a_level_is_worth_less_to_a_request_that_has_much() -> None:
    levels = []
    for own in ([0.3, 0.3], [0.99] * 12):
        found, head = forest(1), RandomHead(1, sharpness=1.0)
        found.retrieve({0: Retrieved([30 + i for i in range(len(own))], [*range(-1, len(own) - 1)], own, 9)})
        grow(found, head, [0], prices(0.01, level=2.0, sampling=1))
        levels.append(len(head.levels))
    assert levels[0] > levels[1]


def test_what_retrieval_saved_is_what_is_missing_without_its_nodes() -> None:
    found = forest(1)
    retrieved(found, {0: [0.9, 0.8]})
    at = prices(row=0.1, sampling=1)
    budget = found.budget(at)
    assert budget.nodes == 2
    expected = (math.log(2.7) - 2 * budget.price) / budget.rate
    assert found.saved_by_retrieval(budget) == pytest.approx(expected)


def test_retrieval_is_credited_with_what_the_head_has_added_below_its_nodes_and_not_with_what_it_has_beside() -> (
    None
):
    found, head = forest(1), RandomHead(1)
    found.retrieve({0: Retrieved([50, 51], [ROOT, 0], [0.9, 0.8], match=9)})
    grow(found, head, [0], prices(0.01, sampling=1), levels=1)
    at = prices(row=0.1, sampling=1)
    before = found.budget(at)
    tokens = float(found.tokens(before)[0])
    alone = tokens - float(found.nodes["gain"][:2].sum())
    expected = (math.log(tokens / alone) - 2 * before.price) / before.rate
    assert found.saved_by_retrieval(before) == pytest.approx(expected)
    below = found.nodes[2:3].copy()  # a node of the head, which is moved below a retrieved one
    below["parent"], below["depth"], below["gain"] = 1, 3, 0.7
    found.nodes = np.concatenate((found.nodes, below))
    found.regain(found.nodes["gain"].tolist())
    after = found.budget(at)
    assert float(found.tokens(after)[0]) == pytest.approx(tokens + 0.7)
    expected = (math.log((tokens + 0.7) / alone) - 3 * after.price) / after.rate
    assert found.saved_by_retrieval(after) == pytest.approx(expected)
