"""Verification on the device: which path of each draft tree the target itself took.

The counterpart of `clover_vllm.tree.walk` for padded trees: every row has the token that plain decoding would sample
there, so greedy and sampled requests walk alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def walk_trees(
    emitted: torch.Tensor,
    cu_num_logits: torch.Tensor,
    request_slots: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From each root to the child that carries what the target emits there, until none does.

    A request with `k` sampled rows takes part with its tree's first k - 1 nodes, which again are a tree.

    Args:
        emitted: int64 [L], the target's token at every sampled row: root, then nodes, request by request.
        cu_num_logits: int32 [R + 1], first sampled row of each request; a request may have none.
        request_slots: int [R], row of each request in `tokens` and `parents` (vLLM's `idx_mapping`).
        tokens: int [slots, N], draft tokens; -1, which no target emits, in padded nodes.
        parents: int [slots, N], index of a node's parent, or -1 for the root. A parent stands before its children;
            of equal siblings the first counts.

    Returns:
        sampled: int64 [R, N + 1], accepted tokens and the bonus token, then -1.
        num_sampled: int32 [R], of these; 0 where a request has no sampled row.
        path: int32 [R, N], by depth, the accepted node's row: 1 + its index; behind the path 0.
    """
    requests, nodes = request_slots.shape[0], tokens.shape[1]
    assert tokens.stride(1) == parents.stride(1) == 1, "a tree's nodes must lie together"
    sampled = emitted.new_empty(requests, nodes + 1, dtype=torch.int64)
    num_sampled = emitted.new_empty(requests, dtype=torch.int32)
    path = emitted.new_empty(requests, nodes, dtype=torch.int32)
    _walk_kernel[(requests,)](
        emitted,
        cu_num_logits,
        request_slots,
        tokens,
        parents,
        sampled,
        num_sampled,
        path,
        tokens.stride(0),
        parents.stride(0),
        NODES=nodes,
        BLOCK=triton.next_power_of_2(nodes + 1),
        num_warps=1,
    )
    return sampled, num_sampled, path


@triton.jit
def _walk_kernel(
    emitted,
    cu_num_logits,
    request_slots,
    tokens,
    parents,
    sampled,
    num_sampled,
    path,
    stride_tokens,
    stride_parents,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per request; its whole tree lies in registers."""
    r = tl.program_id(0)
    start = tl.load(cu_num_logits + r)
    rows = tl.load(cu_num_logits + r + 1) - start
    slot = tl.load(request_slots + r).to(tl.int64)
    node = tl.arange(0, BLOCK)
    mine = node < tl.minimum(rows - 1, NODES)
    token = tl.load(tokens + slot * stride_tokens + node, mask=mine, other=-1).to(tl.int64)
    parent = tl.load(parents + slot * stride_parents + node, mask=mine, other=-2).to(tl.int32)
    found_tokens = tl.full([BLOCK], -1, tl.int64)
    found_rows = tl.full([BLOCK], 0, tl.int32)
    count = 0
    row = tl.where(rows > 0, 0, BLOCK)
    while row < BLOCK:
        target = tl.load(emitted + start + row).to(tl.int64)
        found_tokens = tl.where(node == count, target, found_tokens)
        accepted = mine & (parent == row - 1) & (token == target) & (token >= 0)
        child = tl.min(tl.where(accepted, node, BLOCK), axis=0)
        row = tl.where(child < BLOCK, child + 1, BLOCK)
        found_rows = tl.where((node == count) & (row < BLOCK), row, found_rows)
        count += 1
    tl.store(sampled + r * (NODES + 1) + node, found_tokens, mask=node <= NODES)
    tl.store(path + r * NODES + node, found_rows, mask=node < NODES)
    tl.store(num_sampled + r, count)
