"""What came of verified nodes, as calibration and the ledgers read it."""

from __future__ import annotations

from clover_vllm.tree import Tree
from clover_vllm.tree.kinds import KINDS
from clover_vllm.tree.outcomes import Outcomes

HEAD, BOTH = 0, KINDS - 1


def test_outcomes_of_trees_with_and_without_signals() -> None:
    signed = Tree([5, 6, 7, 8], [-1, -1, 0, 1], signals=[(HEAD, 1.0), (BOTH, 0.0), (HEAD, -1.0), (HEAD, 2.0)])
    padded = Tree.chain([-1, -1])
    seen = Outcomes.of([None, padded, signed, signed.prefix(1)], [[], [0, 1], [0, 2], []])
    assert seen.requests.tolist() == [2, 2, 2, 2, 3]
    assert seen.kinds.tolist() == [HEAD, BOTH, HEAD, HEAD, HEAD]
    assert seen.odds.tolist() == [1.0, 0.0, -1.0, 2.0, 1.0]
    assert seen.accepted.tolist() == [True, False, True, False, False]
    assert seen.tested.tolist() == [True, True, True, False, True]
    assert (seen.count("head"), seen.count("both"), seen.count("retrieved")) == ((4, 2), (1, 0), (0, 0))


def test_no_signals_are_no_outcomes() -> None:
    seen = Outcomes.of([Tree.chain([3]), None], [[0], []])
    assert len(seen.requests) == len(seen.accepted) == 0
    assert seen.count("head") == (0, 0)
