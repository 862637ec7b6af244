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
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from clover_vllm.attention.triton.slots import HeadTensors, lay_out_head


@dataclass(frozen=True)
class ScoredSlots:
    """What a step emitted (made by the runner, read by the speculator)."""

    sampled: torch.Tensor  # int64 [R, N + 1] or [R, 1], tokens, then anything
    path: torch.Tensor | None  # int32 [R, N], see `walk_trees`; None: no request verified anything


class HeadRows(HeadTensors):
    """The head's rows, on the device. The tensors live as long as the engine, so that CUDA graphs find them."""

    @classmethod
    def make(cls, buffers: InputBuffers, requests: torch.Tensor) -> HeadRows:
        """Beside vLLM's buffers of a draft model's inputs, and its place for the requests' slots."""
        rows, device = buffers.max_num_tokens, buffers.device
        return cls(
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            buffers.positions,
            torch.full((rows,), PAD_SLOT_ID, dtype=torch.int64, device=device),
            buffers.query_start_loc,
            buffers.seq_lens,
            torch.zeros_like(requests),
            requests,
        )

    def lay_out(
        self,
        batch: InputBatch,
        scored: ScoredSlots,
        num_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        slot_mapping: torch.Tensor,
        lengths: np.ndarray,
        padded: int,
    ) -> np.ndarray:
        """Lay out the rows of a step.

        Args:
            batch: of the step.
            scored: what it emitted.
            num_sampled: int32 [R].
            next_prefill_tokens: int32 [request slots], the prompt's token behind the step's rows, where it goes on.
            slot_mapping: int64 [rows of the step], of the head's layers.
            lengths: int32 [R], see `head_lengths`.
            padded: R or more requests, of which the others are none and have no rows. Where they have places of their
                own in a CUDA graph, those are as many as the first request's rows, and write no cache.

        Returns:
            int32 [padded + 1], first row of each request, on the host.
        """
        starts = np.zeros(padded + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1 : len(lengths) + 1])
        starts[len(lengths) + 1 :] = starts[len(lengths)]
        async_tensor_h2d(starts, out=self.starts[: padded + 1])
        lay_out_head(
            self,
            padded,
            int(lengths[0]),
            slots=batch.idx_mapping,
            query_start_loc=batch.query_start_loc,
            cu_num_logits=batch.cu_num_logits,
            seq_lens=batch.seq_lens,
            input_ids=batch.input_ids,
            cache_slots=slot_mapping,
            sampled=scored.sampled,
            path=scored.path,
            num_sampled=num_sampled,
            next_prefill_tokens=next_prefill_tokens,
        )
        return starts


def head_lengths(batch: InputBatch, deepest: int) -> np.ndarray:
    """Rows of the head for each request, int32 [R]; with trees of at most `deepest` levels."""
    drafts = batch.num_draft_tokens_per_req
    if drafts is None:
        return batch.num_scheduled_tokens
    return batch.num_scheduled_tokens - drafts + np.minimum(drafts, deepest)
