"""Verification: which path of a draft tree the target itself took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clover_vllm.tree.topology import ROOT, DraftTrees


@dataclass
class Accepted:
    """Outcome of a walk (filled by `walk`)."""

    nodes: torch.Tensor  # int64 [R, depth], accepted nodes by depth, index within the request, or ROOT
    lengths: torch.Tensor  # int64 [R], accepted nodes per request
    last: torch.Tensor  # int64 [R], the last accepted node, or ROOT


def walk(trees: DraftTrees, emitted: torch.Tensor) -> Accepted:
    """From the root to the child that carries what the target emits there, until none does.

    The target's token at every row is an ordinary sampling step of the target, so the accepted
    tokens and the token emitted at the last accepted row are exactly what plain decoding with the
    same randomness gives.

    Args:
        trees: R trees, N nodes in all; siblings carry different tokens.
        emitted: int64 [N + R], the target's token at every row, a request's root row before its
            node rows.
    """
    request = trees.request_of_node
    device = trees.tokens.device
    row_base = trees.offsets[:-1] + torch.arange(trees.num_requests, device=device)
    within = torch.arange(trees.tokens.shape[0], device=device) - trees.offsets[request]
    current = torch.full((trees.num_requests,), ROOT, dtype=torch.int64, device=device)
    lengths = torch.zeros_like(current)
    steps: list[torch.Tensor] = []
    depth = int(trees.depths.max()) if trees.tokens.numel() else 0
    for _ in range(depth):
        wanted = emitted[row_base + current + 1]
        going = lengths == len(steps)  # not yet stopped
        match = (trees.parents == current[request]) & (trees.tokens == wanted[request]) & going[request]
        found = torch.full_like(current, ROOT)
        found[request[match]] = within[match]
        hit = found != ROOT
        current = torch.where(hit, found, current)
        lengths = lengths + hit
        steps.append(found)
    nodes = torch.stack(steps, dim=1) if steps else current.new_zeros(trees.num_requests, 0)
    return Accepted(nodes, lengths, current)


def walk_tree(tokens: Sequence[int], parents: Sequence[int], emitted: Sequence[int]) -> list[int]:
    """`walk` for one tree on the host: the accepted nodes, by depth.

    One pass is enough, since a parent always stands before its children.

    Args:
        tokens: of the nodes.
        parents: of the nodes, index or ROOT.
        emitted: the target's token at every row, the root's first.
    """
    accepted: list[int] = []
    current = ROOT
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        if parent == current and token == emitted[current + 1]:
            accepted.append(node)
            current = node
    return accepted
