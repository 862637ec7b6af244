"""Logits processors of a user's own, for `test_features.py`; engine processes import them by name."""

from __future__ import annotations

from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, BatchUpdate, LogitsProcessor


class EveryOther:
    """Forbids the tokens of one parity at even output positions, of the other at odd ones."""

    def __call__(self, output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[len(output_ids) % 2 :: 2] = -torch.inf
        return logits


class PerRequest(AdapterLogitsProcessor):
    """vLLM's adapter for per-request processors, which see the request's output so far."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        return EveryOther() if (params.extra_args or {}).get("every_other") else None


class FollowsOutput(LogitsProcessor):
    """For a whole batch: favours a token that depends on the output so far."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory
        self._outputs: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index, params, _, output_ids in batch_update.added:
            self._outputs.pop(index, None)
            if (params.extra_args or {}).get("favour"):
                self._outputs[index] = output_ids
        for index in batch_update.removed:
            self._outputs.pop(index, None)
        for source, destination, direction in batch_update.moved:
            moved, other = self._outputs.pop(source, None), self._outputs.pop(destination, None)
            if moved is not None:
                self._outputs[destination] = moved
            if other is not None and direction.name == "SWAP":
                self._outputs[source] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, outputs in self._outputs.items():
            logits[row, sum(outputs) % 300] += 4.0
        return logits
