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


def prices(row: float, level: float = 0.0, base: float = 10.0, sampling: int = 1) -> Prices:
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
