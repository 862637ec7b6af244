"""What the head reads after a step: prompt rows, and the rows of the accepted path in the order of decoding.

Shapes depend on what the host knows alone. A request with `q` rows of which `n` are drafts has `q - n` rows that are
certain and room for as many accepted nodes as its tree has levels; rows of that room without a node write no cache.

Legend: R requests of the batch, H rows of the head, N nodes of the largest tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.input_batch import InputBatch


@dataclass(frozen=True)
class Scored:
    """What a step emitted (made by the runner, read by the speculator)."""

    sampled: torch.Tensor  # int64 [R, N + 1] or [R, 1], tokens, then anything
    path: torch.Tensor | None  # int32 [R, N], see `walk_trees`; None: no request verified anything


@dataclass(frozen=True)
class HeadRows:
    """The head's rows of a step, on the device."""

    starts_np: np.ndarray  # int32 [R + 1], on the host, first row of each request
    source: torch.Tensor  # int64 [H], row of the step
    next_tokens: torch.Tensor  # int64 [H], the token behind each
    positions: torch.Tensor  # int64 [H]
    slots: torch.Tensor  # int64 [H], cache slot, or PAD_SLOT_ID
    starts: torch.Tensor  # int32 [R + 1]
    seq_lens: torch.Tensor  # int32 [R], tokens before and in the head's rows
    last: torch.Tensor  # int64 [R], each request's last row that is true


def head_rows(
    batch: InputBatch,
    scored: Scored,
    num_sampled: torch.Tensor,
    next_prefill_tokens: torch.Tensor,
    slot_mapping: torch.Tensor,
    deepest: int,
) -> HeadRows:
    """Lay out the head's rows.

    Args:
        batch: of the step.
        scored: what it emitted.
        num_sampled: int32 [R].
        next_prefill_tokens: int32 [request slots], the prompt's token behind the step's rows, where it goes on.
        slot_mapping: int64 [rows of the step], of the head's layers.
        deepest: most levels of a tree.
    """
    device = batch.input_ids.device
    scheduled, drafts = batch.num_scheduled_tokens, batch.num_draft_tokens_per_req
    drafts = np.zeros_like(scheduled) if drafts is None else drafts
    certain = scheduled - drafts
    rows = certain + np.minimum(drafts, deepest)
    starts_np = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(rows, out=starts_np[1:])
    request_np = np.repeat(np.arange(len(rows)), rows)
    row_np = np.arange(starts_np[-1]) - starts_np[:-1][request_np]
    given = np.stack([request_np, row_np, row_np - certain[request_np] + 1])
    request, row, node = async_tensor_h2d(given, device=device)  # node: 0 at a root, below it in a prompt
    of_request = async_tensor_h2d(np.stack([certain, rows]).astype(np.int64), device=device)

    first = batch.query_start_loc[:-1].long()
    first = first[: batch.num_reqs]
    base = batch.seq_lens[: batch.num_reqs] - batch.query_start_loc.diff()[: batch.num_reqs]
    emitted = num_sampled.clamp(min=1).long()
    below = row
    if scored.path is not None:
        accepted = scored.path[request, (node - 1).clamp(min=0)].long()
        below = torch.where(node > 0, row - node + accepted, row)
    source = first[request] + below
    width = scored.sampled.shape[1]
    sampled = scored.sampled[request, node.clamp(min=0, max=width - 1)]
    behind = batch.input_ids[(source + 1).clamp(max=len(batch.input_ids) - 1)].long()
    prompt_goes_on = next_prefill_tokens[batch.idx_mapping][request].long()
    tokens = torch.where(node < 0, behind, torch.where(num_sampled[request] > 0, sampled, prompt_goes_on))
    is_true = node < emitted[request]
    return HeadRows(
        starts_np,
        source,
        tokens.where(is_true, 0),
        base[request] + row,
        slot_mapping[first[request] + row].where(is_true, PAD_SLOT_ID),
        async_tensor_h2d(starts_np, device=device),
        base + of_request[1].int(),
        async_tensor_h2d(starts_np[:-1].astype(np.int64), device=device) + of_request[0] + emitted - 2,
    )
