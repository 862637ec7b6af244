"""The kernels of this room in plain PyTorch: what tests compare them with. They wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clover_vllm.attention.triton.inputs import CAUSAL, PagedTrees


def tree_attention_reference(
    query: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    trees: PagedTrees,
    scale: float,
    *,
    window: int = 0,
    all_rows: bool = False,
    query_scale: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`tree_attention.tree_attention` in float64; it writes nothing.

    Returns:
        float64 [T, heads, D]: what `output` holds after the call.
    """
    _, kv_heads, page, double = cache.shape
    dim, group = double // 2, query.shape[1] // kv_heads
    found = output.double()
    starts, lengths = trees.query_start_loc.tolist(), trees.seq_lens.tolist()
    for r, length in enumerate(lengths):
        first, rows = starts[r], starts[r + 1] - starts[r]
        if not rows or (not all_rows and int(trees.bits[first]) == CAUSAL):
            continue
        pages = cache[trees.block_table[r, : -(-length // page)].long()].double()
        tokens = pages.transpose(1, 2).flatten(0, 1)[:length].repeat_interleave(group, dim=1)
        keys, values = tokens.split(dim, dim=-1)  # [length, heads, D]
        q = query[first : first + rows].double()
        scores = torch.einsum("nhd,thd->hnt", q, keys) * scale * _factor(query_scale) * _factor(key_scale)
        visible = _visible(trees.bits[first : first + rows], length - rows, window)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        if bool(values.isfinite().all()):
            attended = torch.einsum("hnt,thd->nhd", weights, values)
        else:  # 0 times infinity would reach rows that do not see it
            products = weights[..., None] * values.transpose(0, 1)[:, None]  # [heads, rows, length, D]
            attended = products.masked_fill(~visible[None, ..., None], 0).sum(2).transpose(0, 1)
        found[first : first + rows] = attended * _factor(value_scale)
    return found


def _visible(bits: torch.Tensor, context: int, window: int) -> torch.Tensor:
    """bool [rows, context + rows]: who sees whom among a request's rows."""
    rows = len(bits)
    index = torch.arange(rows, device=bits.device)
    named = (bits[:, None] >> index.clamp(max=63)) & 1 == 1
    visible = torch.ones(rows, context + rows, dtype=torch.bool, device=bits.device)
    visible[:, context:] = named & (index[:, None] >= index)
    if window:
        depth = torch.where(bits == CAUSAL, index, visible[:, context:].sum(1) - 1)
        position = torch.cat([torch.arange(context, device=bits.device), context + depth])
        visible &= position[context:, None] - position < window
    return visible


def _factor(scale: torch.Tensor | None) -> float:
    return 1.0 if scale is None else float(scale)


def move_accepted_reference(
    caches: Sequence[torch.Tensor],
    slots: torch.Tensor,
    roots: torch.Tensor,
    path: torch.Tensor,
    num_sampled: torch.Tensor,
) -> None:
    """`cache_rows.CacheRows.move_accepted`, for caches of [blocks, kv heads, block size, 2 D]."""
    page = caches[0].shape[2]
    for r, count in enumerate(num_sampled.tolist()):
        for depth in range(1, count):
            source = int(slots[int(roots[r]) + int(path[r, depth - 1])])
            destination = int(slots[int(roots[r]) + depth])
            for cache in caches:
                cache[destination // page, :, destination % page] = cache[source // page, :, source % page]


def walk_trees_reference(
    emitted: torch.Tensor,
    cu_num_logits: torch.Tensor,
    request_slots: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`walk.walk_trees`."""
    requests, nodes = request_slots.shape[0], tokens.shape[1]
    sampled = torch.full((requests, nodes + 1), -1)
    path = torch.zeros(requests, nodes, dtype=torch.int32)
    num_sampled = torch.zeros(requests, dtype=torch.int32)
    offsets = cu_num_logits.tolist()
    for r, slot in enumerate(request_slots.tolist()):
        own = emitted[offsets[r] : offsets[r + 1]].tolist()
        of_tree = list(zip(parents[slot].tolist(), tokens[slot].tolist(), strict=True))[
            : max(len(own) - 1, 0)
        ]
        row = 0 if own else None
        while row is not None:
            count = int(num_sampled[r])
            sampled[r, count] = own[row]
            num_sampled[r] += 1
            key = (row - 1, own[row])
            row = of_tree.index(key) + 1 if key in of_tree else None
            if row is not None:
                path[r, count] = row
    device = emitted.device
    return sampled.to(device), num_sampled.to(device), path.to(device)
