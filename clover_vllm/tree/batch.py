"""Draft trees of many requests in tensors of fixed shapes, so that nothing waits for the device.

Legend: R requests, N nodes of the largest tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clover_vllm.tree.draft import ROOT, Tree

PADDING = -1
"""Token of a node that is none. No target emits it, so it is never accepted; its parent is the root."""


@dataclass(frozen=True)
class TreeBatch:
    """One tree per request, padded behind its nodes."""

    tokens: torch.Tensor  # int64 [R, N], or PADDING
    parents: torch.Tensor  # int64 [R, N], index within the request's own nodes, or ROOT
    log_probs: torch.Tensor  # float32 [R, N], joint log-probability of the path to the node; -inf in padding

    def __post_init__(self) -> None:
        for name in ("parents", "log_probs"):
            assert getattr(self, name).shape == self.tokens.shape, f"{name} must have one entry per node"

    def to_host(self) -> list[Tree]:
        """One tree per request. Waits for the device."""
        rows = zip(self.tokens.tolist(), self.parents.tolist(), self.log_probs.exp().tolist(), strict=True)
        return [
            Tree(tokens[:count], parents[:count], joint[:count])
            for tokens, parents, joint in rows
            for count in [sum(token != PADDING for token in tokens)]
        ]

    def padded(self, num_nodes: int) -> TreeBatch:
        """The same trees with room for `num_nodes` nodes each, which must suffice."""
        more = num_nodes - self.tokens.shape[1]
        assert more >= 0, "a tree has more nodes than there is room for"
        if not more:
            return self
        return TreeBatch(
            torch.nn.functional.pad(self.tokens, (0, more), value=PADDING),
            torch.nn.functional.pad(self.parents, (0, more), value=ROOT),
            torch.nn.functional.pad(self.log_probs, (0, more), value=-torch.inf),
        )


def likeliest_chains(tokens: torch.Tensor, parents: torch.Tensor, longest: int) -> torch.Tensor:
    """As `Tree.likeliest_chain`, of many trees.

    Args:
        tokens: int64 [R, N], or PADDING.
        parents: int64 [R, N].
        longest: nodes per chain that are looked for; no tree is deeper.

    Returns:
        int64 [R, N], the chains' tokens, then PADDING.
    """
    chains = torch.full_like(tokens, PADDING)
    current = torch.full_like(tokens[:, :1], ROOT)
    for depth in range(min(longest, tokens.shape[1])):
        children = (parents == current) & (tokens != PADDING)
        found, first = children.max(dim=1, keepdim=True)  # the first of equal ones
        chains[:, depth : depth + 1] = tokens.gather(1, first).where(found, PADDING)
        current = first.where(found, ROOT - 1)
    return chains


def ancestry(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Who is above whom, by pointer doubling.

    Args:
        parents: int64 [R, N]; a parent stands before its children.

    Returns:
        bits: int64 [R, N], as `Tree.masks` without the root's row: bit 0 for the root, bit i + 1 for node i.
        depths: int64 [R, N], 1 under the root.
    """
    nodes = parents.shape[1]
    bits = (torch.ones_like(parents) << torch.arange(1, nodes + 1, device=parents.device)).contiguous()
    depths = torch.ones_like(parents)
    above = parents
    for _ in range(nodes.bit_length()):
        inside = above >= 0
        at = above.clamp(min=0)
        bits = bits | bits.gather(1, at).where(inside, 0)
        depths = depths + depths.gather(1, at).where(inside, 0)
        above = above.gather(1, at).where(inside, ROOT)
    return bits | 1, depths
