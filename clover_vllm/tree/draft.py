"""A draft tree on the host; `batch` has many in tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

ROOT = -1
"""Parent index of the nodes directly under the root."""

MAX_NODES = 63
"""Nodes per tree: with the root, one bit each in an int64."""


@dataclass(frozen=True)
class Tree:
    """One request's draft tree, from growth to verification. A parent always stands before its children.

    A request's *rows* in a step are its root (row 0) and its nodes in order (row i + 1).
    """

    tokens: Sequence[int]
    parents: Sequence[int]  # index or ROOT
    probabilities: Sequence[float] = ()  # joint, as the drafter sees them; empty where it does not say
    kinds: Sequence[int] = ()  # see `tree.kinds`; empty where the drafter does not say

    @classmethod
    def chain(cls, tokens: Sequence[int], probabilities: Sequence[float] = ()) -> Tree:
        """A single path."""
        return cls(tokens, range(-1, len(tokens) - 1), probabilities)

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def is_chain(self) -> bool:
        return [*self.parents] == [*range(-1, len(self.parents) - 1)]

    @cached_property
    def depths(self) -> list[int]:
        """By node, 1 under the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    @cached_property
    def masks(self) -> list[int]:
        """By row: bit j is set if the row sees its request's row j; the 64th bit is the sign.

        A row sees itself, its ancestors and the root (and, without a bit, all that is cached before it).

        Raises:
            ValueError: more than `MAX_NODES` nodes.
        """
        if len(self) > MAX_NODES:
            raise ValueError(f"A tree has {len(self)} nodes; bitmasks hold {MAX_NODES}.")
        masks = [1]
        for node, parent in enumerate(self.parents):
            masks.append(masks[parent + 1] | 1 << (node + 1))
        return signed(masks) if len(self) == MAX_NODES else masks

    @cached_property
    def children(self) -> dict[tuple[int, int], int]:
        """(parent, token) -> node; of equal siblings the first."""
        keys = zip(reversed(self.parents), reversed(self.tokens), strict=True)
        return dict(zip(keys, reversed(range(len(self))), strict=True))

    def prefix(self, count: int) -> Tree:
        """The first nodes, which again are a tree."""
        if count >= len(self):
            return self
        return Tree(self.tokens[:count], self.parents[:count], self.probabilities[:count], self.kinds[:count])

    def likeliest_chain(self) -> Tree:
        """The path of first children; a tree's nodes stand in falling order of probability."""
        path: list[int] = []
        current = ROOT
        for node, parent in enumerate(self.parents):
            if parent == current:
                path.append(node)
                current = node
        chain = Tree.chain([self.tokens[node] for node in path])
        return replace(
            chain,
            probabilities=[self.probabilities[node] for node in path] if self.probabilities else (),
            kinds=[self.kinds[node] for node in path] if self.kinds else (),
        )


def signed(masks: Sequence[int]) -> list[int]:
    """64-bit masks as int64 values."""
    return [mask - (1 << 64) if mask >> 63 else mask for mask in masks]


def causal_masks(rows: int) -> list[int]:
    """Masks of the rows of a request that decodes or prefills: each sees those up to itself."""
    return signed([(1 << (row + 1)) - 1 for row in range(rows)])
