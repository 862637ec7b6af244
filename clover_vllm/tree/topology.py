"""What a batch of draft trees is, and trees of a fixed shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROOT = -1
"""Parent index of the nodes directly under the root."""


@dataclass
class DraftTrees:
    """Draft trees of a batch of requests, flat; filled by the functions of `growth`.

    Request r owns nodes offsets[r] to offsets[r + 1]. Within a request nodes are in order of
    falling joint probability (best-first growth) or of the static shape, parents always first.
    """

    tokens: torch.Tensor  # int64 [N]
    parents: torch.Tensor  # int64 [N], index within the request's own nodes, or ROOT
    depths: torch.Tensor  # int64 [N], 1 under the root
    log_probs: torch.Tensor  # float32 [N], joint log-probability of the path to the node
    offsets: torch.Tensor  # int64 [R + 1]

    def __post_init__(self) -> None:
        nodes = self.tokens.shape[0]
        for name in ("parents", "depths", "log_probs"):
            assert getattr(self, name).shape == (nodes,), f"{name} must have one entry per node"

    @property
    def num_requests(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def request_of_node(self) -> torch.Tensor:
        """int64 [N]."""
        counts = self.offsets[1:] - self.offsets[:-1]
        return torch.repeat_interleave(torch.arange(self.num_requests, device=self.tokens.device), counts)

    def to(self, device: torch.device | str) -> DraftTrees:
        """The same trees on a device."""
        return DraftTrees(
            self.tokens.to(device),
            self.parents.to(device),
            self.depths.to(device),
            self.log_probs.to(device),
            self.offsets.to(device),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[DraftTrees]) -> DraftTrees:
        """The requests of several batches, in order."""
        counts = torch.cat([part.offsets[1:] - part.offsets[:-1] for part in parts])
        return cls(
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.parents for part in parts]),
            torch.cat([part.depths for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            offsets_of(counts),
        )

    def truncate(self, sizes: torch.Tensor) -> DraftTrees:
        """The first nodes of every request's tree, which again are trees.

        Args:
            sizes: int64 [R], most nodes to keep per request.
        """
        request = self.request_of_node
        rank = torch.arange(self.tokens.shape[0], device=self.tokens.device) - self.offsets[request]
        keep = rank < sizes[request]
        counts = torch.minimum(self.offsets[1:] - self.offsets[:-1], sizes)
        return DraftTrees(
            self.tokens[keep],
            self.parents[keep],
            self.depths[keep],
            self.log_probs[keep],
            offsets_of(counts),
        )


def offsets_of(counts: torch.Tensor) -> torch.Tensor:
    """Exclusive prefix sum with the total at the end: int64 [R] -> [R + 1]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class StaticTopology:
    """A tree of fixed shape, given as paths of child ranks.

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


def chain(length: int) -> StaticTopology:
    """A single path of the most likely tokens."""
    return StaticTopology([(0,) * depth for depth in range(1, length + 1)])


PUBLISHED_25 = StaticTopology(
    [(r,) for r in range(4)]
    + [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    + [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0)]
    + [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 0, 0), (0, 0, 0, 0, 1)]
)
"""The tree of the published Clover-2 implementation, 25 nodes."""
