"""What came of candidates and of verified nodes, as calibration and the ledgers read it."""

from __future__ import annotations

import numpy as np

from clover_vllm.tree import ROOT, Tree
from clover_vllm.tree.calibration import Calibration
from clover_vllm.tree.forest import Forest, Retrieved
from clover_vllm.tree.kinds import KINDS, SOURCES
from clover_vllm.tree.outcomes import count_sources

HEAD, BOTH = 0, KINDS - 1


def counted(trees: list[Tree | None], accepted: list[list[int]]) -> dict[str, tuple[int, int]]:
    nodes, came = count_sources(trees, accepted)
    return {source: (int(nodes[i]), int(came[i])) for i, source in enumerate(SOURCES)}


def test_verified_nodes_are_counted_by_who_proposed_them() -> None:
    told = Tree([5, 6, 7, 8], [-1, -1, 0, 1], kinds=[HEAD, BOTH, HEAD, HEAD])
    padded = Tree.chain([-1, -1])
    found = counted([None, padded, told, told.prefix(1)], [[], [0, 1], [0, 2], []])
    assert found == {"head": (4, 2), "both": (1, 0), "retrieved": (0, 0)}


def test_trees_that_do_not_tell_their_kinds_count_nothing() -> None:
    assert set(counted([Tree.chain([3]), None, Tree([], [])], [[0], [], []]).values()) == {(0, 0)}


class Head:
    """Proposes the tokens 20, 21, 22 behind every root, and 30, 31, 32 behind all else, never as likely as before."""

    rows = 0

    def first(self) -> tuple[np.ndarray, np.ndarray]:
        return self._level(2, 20)

    def expand(self, parents: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._level(len(parents), 30)

    def _level(self, rows: int, token: int) -> tuple[np.ndarray, np.ndarray]:
        shares = 0.99 ** np.arange(self.rows, self.rows + rows)
        self.rows += rows
        return np.log(np.outer(shares, [0.6, 0.3, 0.05])), np.tile(token + np.arange(3), (rows, 1))


def candidates(requests: int = 3) -> Forest:
    """The first request has retrieved 20 40 41 and 50; the head was asked for that and the second."""
    from test_forest import prices

    found = Forest([16] * requests, [9] * requests, [Calibration(KINDS)] * requests)
    found.retrieve({0: Retrieved([20, 40, 41, 50], [ROOT, 0, 1, ROOT], [0.5, 0.5, 0.4, 0.2], match=4)})
    found.grow_head(Head(), [0, 1], prices(0.01), np.full(14, 0.9), 2)
    return found


def paths(found: Forest) -> list[tuple[int, ...]]:
    """Request and tokens of each candidate."""
    made: list[tuple[int, ...]] = []
    for node in found.nodes:
        above = (int(node["request"]),) if node["parent"] == ROOT else made[node["parent"]]
        made.append((*above, int(node["token"])))
    return made


def labels(found: Forest, said: list[list[int]]) -> dict[tuple[int, ...], bool]:
    """By request and path, whether the target has said it."""
    nodes, seen = found.nodes, found.outcomes(said)
    signals = [(int(n["request"]), int(n["kind"]), float(n["odds"])) for n in nodes]
    of_signal = dict(zip(signals, paths(found), strict=True))
    assert len(of_signal) == len(nodes), "paths can be told by their signals"
    keys = zip(seen.requests.tolist(), seen.kinds.tolist(), seen.odds.tolist(), strict=True)
    return {of_signal[key]: bool(right) for key, right in zip(keys, seen.said, strict=True)}


def test_every_candidate_on_the_way_is_labelled_by_the_text_verified_or_not() -> None:
    found = candidates()
    assert {(0, 20, 40), (0, 50), (0, 20, 30), (0, 21, 30), (1, 21, 30)} <= set(paths(found))
    said = labels(found, [[20, 40], [21], []])
    assert said[0, 20]
    assert said[0, 20, 40]
    assert not said[0, 50]
    assert not said[0, 20, 30]
    assert (0, 20, 40, 41) not in said, "what follows is not known yet"
    assert not said[1, 20]
    assert said[1, 21]
    assert not any(path[:2] == (0, 21) for path in said if len(path) > 2), "behind a token that was not said"
    assert not any(path[0] == 1 for path in said if len(path) > 2), "not said yet"


def test_of_requests_whose_text_is_not_known_nothing_is_learnt() -> None:
    found = candidates()
    assert not labels(found, [[], [], []])
    said = labels(found, [[], [20, 31], [7]])
    assert {path[0] for path in said} == {1}
    assert said[1, 20, 31]
    assert not said[1, 20, 30]
    assert (1, 21, 31) in paths(found)
    assert (1, 21, 31) not in said, "the same token, behind another one"
