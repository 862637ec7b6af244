"""A logits processor of a user's own for vLLM's V2 runner; engine processes import it by name."""

from __future__ import annotations

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)


class FollowsOutput(LogitsProcessor):
    """Favours a token that depends on the last two; what is before a row of drafts is in the rows before it."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        del vllm_config
        self._states = req_states
        self._wanted = torch.zeros(req_states.max_num_reqs, dtype=torch.bool, device=req_states.device)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        wanted = bool((sampling_params.extra_args or {}).get("favour"))
        self._wanted[req_idx] = wanted
        return wanted

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        slots, last = ctx.expanded_idx_mapping, ctx.input_ids
        before = (self._states.total_len.gpu[slots] - 2).clamp(min=0).long()
        earlier = self._states.all_token_ids.gpu[slots, before].where(
            ctx.expanded_local_pos == 0, last.roll(1)
        )
        favoured = (3 * last + earlier).long() % logits.shape[1]
        return logits.scatter_add(1, favoured[:, None], 4.0 * self._wanted[slots][:, None].to(logits.dtype))
