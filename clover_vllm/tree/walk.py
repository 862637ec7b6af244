"""Verification: which path of a draft tree the target itself took."""

from __future__ import annotations

from collections.abc import Sequence

from clover_vllm.tree.draft import ROOT, Tree


def walk(tree: Tree, emitted: Sequence[int]) -> list[int]:
    """From the root to the child that carries what the target emits there, until none does.

    The target's token at every row is an ordinary sampling step of the target, so the accepted
    tokens and the token emitted at the last accepted row are exactly what plain decoding with the
    same randomness gives.

    Args:
        tree: whose rows were verified.
        emitted: the target's token at every row, the root's first.

    Returns:
        the accepted nodes, by depth.
    """
    accepted: list[int] = []
    node = tree.children.get((ROOT, emitted[0]))
    while node is not None:
        accepted.append(node)
        node = tree.children.get((node, emitted[node + 1]))
    return accepted
