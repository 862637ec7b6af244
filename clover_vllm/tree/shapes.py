"""Trees of a fixed shape."""

from __future__ import annotations

from collections.abc import Sequence

from clover_vllm.tree.draft import ROOT


class Shape:
    """A fixed shape, given as paths of child ranks.

    The path (0, 2) is the third most likely child of the most likely child of the root.
    """

    def __init__(self, paths: Sequence[tuple[int, ...]]) -> None:
        """Paths in any order; sorted here by depth, then by rank.

        Raises:
            ValueError: a path is empty, repeated, negative, or lacks its parent.
        """
        ordered = sorted(paths, key=lambda p: (len(p), p))
        known: dict[tuple[int, ...], int] = {(): ROOT}
        for path in ordered:
            if not path or min(path) < 0:
                raise ValueError(f"{path} is not a path of child ranks.")
            if path in known:
                raise ValueError(f"The path {path} is given twice.")
            if path[:-1] not in known:
                raise ValueError(f"The path {path} has no parent {path[:-1]} in the tree.")
            known[path] = len(known) - 1
        self.paths = ordered
        self.parents = [known[path[:-1]] for path in ordered]
        self.ranks = [path[-1] for path in ordered]
        self.depths = [len(path) for path in ordered]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def max_depth(self) -> int:
        return max(self.depths, default=0)

    @property
    def max_rank(self) -> int:
        return max(self.ranks, default=0)

    def nodes_at(self, depth: int) -> list[int]:
        """Indices of the nodes at a depth."""
        return [i for i, d in enumerate(self.depths) if d == depth]


def chain(length: int) -> Shape:
    """A single path of the most likely tokens."""
    return Shape([(0,) * depth for depth in range(1, length + 1)])


PUBLISHED_25 = Shape(
    [(r,) for r in range(4)]
    + [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    + [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0)]
    + [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 0, 0), (0, 0, 0, 0, 1)]
)
"""The tree of the published Clover-2 implementation, 25 nodes."""
