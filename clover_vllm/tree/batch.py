"""Draft trees of many requests in tensors of fixed shapes, so that nothing waits for the device.

Legend: R requests, N nodes of the largest tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clover_vllm.tree.draft import Tree

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
