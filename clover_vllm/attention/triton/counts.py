"""What steps verified and accepted, added up on the device, so that the host need not look at each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from clover_vllm.attention.triton.slots import KeptTrees

TOTALS = 6
"""Counts of all trees; the others are by number of nodes, or by depth."""


def width_of(nodes: int) -> int:
    """Counts for trees of up to `nodes` nodes."""
    return TOTALS + 1 + 3 * nodes


def count_trees(
    counts: torch.Tensor,
    kept: KeptTrees,
    slots: torch.Tensor,
    cu_num_logits: torch.Tensor,
    path: torch.Tensor,
    num_sampled: torch.Tensor,
    temperatures: torch.Tensor,
) -> None:
    """Add what a step verified. A request without a node that could be accepted verified none.

    Args:
        counts: float64 [width_of(N)], grows in place: nodes; trees; accepted nodes that the head expected; trees whose
            first node was accepted; trees of greedy requests; those of them whose first node was accepted; then trees
            by number of nodes, from 0; trees that reach depth 1, 2, ..., N; trees that are accepted to each.
        kept: trees by slot, as they were walked.
        slots: int64 [R].
        cu_num_logits: int32 [R + 1], first sampled row of each request.
        path: int32 [R, N], see `walk_trees`.
        num_sampled: int32 [R].
        temperatures: float32 [S]; 0 is greedy.
    """
    _count_kernel[(len(slots),)](
        counts,
        slots,
        cu_num_logits,
        path,
        num_sampled,
        temperatures,
        kept.tokens,
        kept.depths,
        kept.probabilities,
        path.stride(0),
        NODES=kept.nodes,
        BLOCK=max(8, triton.next_power_of_2(kept.nodes)),
        BEHIND=TOTALS,
        num_warps=1,
    )


@triton.jit(do_not_specialize=["stride_path"])
def _count_kernel(
    counts,
    slots,
    cu_num_logits,
    path,
    num_sampled,
    temperatures,
    tokens,
    depths,
    probabilities,
    stride_path,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
    BEHIND: tl.constexpr,
):
    """One program per request."""
    r = tl.program_id(0)
    slot = tl.load(slots + r).to(tl.int64)
    rows = tl.load(cu_num_logits + r + 1) - tl.load(cu_num_logits + r)
    node = tl.arange(0, BLOCK)
    mine = node < tl.minimum(rows - 1, NODES)
    mine = mine & (tl.load(tokens + slot * NODES + node, mask=mine, other=-1) >= 0)
    nodes = tl.sum(mine.to(tl.int32), axis=0)
    if nodes == 0:
        return
    deepest = tl.max(tl.load(depths + slot * (NODES + 1) + 1 + node, mask=mine, other=0), axis=0)
    promised = tl.sum(tl.load(probabilities + slot * NODES + node, mask=mine, other=0.0), axis=0)
    accepted = tl.load(num_sampled + r) - 1
    first = ((accepted > 0) & (tl.load(path + r * stride_path) == 1)).to(tl.float64)
    greedy = (tl.load(temperatures + slot) == 0.0).to(tl.float64)
    one = tl.full([BLOCK], 1.0, tl.float64)
    total = tl.where(node == 0, nodes.to(tl.float64), one)
    total = tl.where(node == 2, promised.to(tl.float64), total)
    total = tl.where(node == 3, first, total)
    total = tl.where(node == 4, greedy, total)
    total = tl.where(node == 5, greedy * first, total)
    tl.atomic_add(counts + node, total, mask=node < BEHIND, sem="relaxed")
    by_size = counts + BEHIND
    tl.atomic_add(by_size + 1 + node, one, mask=node + 1 == nodes, sem="relaxed")
    by_depth = by_size + NODES + 1
    tl.atomic_add(by_depth + node, one, mask=node < deepest, sem="relaxed")
    tl.atomic_add(by_depth + NODES + node, one, mask=node < accepted, sem="relaxed")
