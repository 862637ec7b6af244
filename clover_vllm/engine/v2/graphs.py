"""CUDA graphs of drafting, and of steps with trees of several sizes, made and kept by vLLM's own machinery.

vLLM captures those of drafting behind its own (`GPUModelRunner.capture_model`), in the same pool of memory, and counts
that memory. All of them are for a padded number of requests with the same number of rows each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
    ModelCudaGraphManager,
)

GROWTH = 1.25
"""Least ratio between numbers of requests that have a graph, beyond `DENSE`; of plain steps, all of vLLM's have one."""

DENSE = 8
"""Up to this many requests, all of vLLM's sizes have a graph."""


class EvenGraphs(CudaGraphManager):
    """Graphs of batches whose requests have the same number of rows; a mixin."""

    def plan(self, rows: Sequence[int], most_rows: int) -> None:
        """Choose the graphs that are captured.

        Args:
            rows: numbers of rows per request that occur.
            most_rows: of a graph.
        """
        captured = self.compilation_config.cudagraph_capture_sizes or []
        self._sizes = {
            own: request_sizes(
                {*captured, *(-(-size // own) for size in captured)},  # vLLM's sizes are of rows
                min(self.max_num_reqs, most_rows // own),
                GROWTH if own > 1 else 1.0,
            )
            for own in sorted(set(rows))
        }
        found = [_description(size, own) for own, sizes in self._sizes.items() for size in sizes]
        if found:
            self._capture_descs[CUDAGraphMode.FULL] = sorted(found, key=lambda d: d.num_tokens, reverse=True)

    def find(self, requests: int, rows: int) -> BatchExecutionDescriptor | None:
        """The smallest graph for a batch, or None."""
        sizes = self._sizes.get(rows, [])
        index = bisect_left(sizes, requests)
        if not self._graphs_captured or index == len(sizes):
            return None
        return _description(sizes[index], rows)


class DraftGraphs(EvenGraphs):
    """Of a part of drafting."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, is_on: bool, rows: Sequence[int], most_rows: int
    ) -> None:
        """
        Args:
            vllm_config: of the engine.
            device: of the engine.
            is_on: whether there are graphs at all.
            rows: see `plan`.
            most_rows: see `plan`.
        """
        mode = CUDAGraphMode.FULL_DECODE_ONLY if is_on else CUDAGraphMode.NONE
        super().__init__(vllm_config, device, mode, decode_query_len=max(rows))
        self.plan(rows if is_on else [], most_rows)

    def _init_candidates(self) -> None:
        """Nothing; see `plan`."""


class TargetGraphs(EvenGraphs, ModelCudaGraphManager):
    """Of the target, for trees of several sizes; those of steps with prompts are vLLM's own."""

    def __init__(self, ladder: Sequence[int], *args: Any, **kwargs: Any) -> None:
        """ladder: sizes of trees; the rest is vLLM's."""
        super().__init__(*args, **kwargs)
        self._sizes: dict[int, list[int]] = {}
        mode = self.cudagraph_mode
        if mode and mode.decode_mode() == CUDAGraphMode.FULL and mode.separate_routine():
            self._capture_descs.pop(CUDAGraphMode.FULL, None)
            for key, found in self._candidates.items():
                self._candidates[key] = [d for d in found if d.cg_mode != CUDAGraphMode.FULL]
            most = self.compilation_config.max_cudagraph_capture_size or 0
            self.plan([1 + size for size in ladder], most)

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
        num_ubatches: int = 1,
    ) -> BatchExecutionDescriptor:
        """As the base class."""
        found = self.find(num_reqs, uniform_token_count or 0)
        if found is not None and not num_active_loras:
            return found
        return super().dispatch(
            num_reqs, num_tokens, uniform_token_count, num_active_loras, max_query_len, num_ubatches
        )


def request_sizes(wanted: Iterable[int], most: int, apart: float) -> list[int]:
    """Numbers of requests that have a graph: of the wanted ones those that lie apart, and at the end `most` itself.

    Args:
        wanted: in any order.
        most: requests that run at once; 0 if none have a graph.
        apart: least ratio between two of them, beyond `DENSE`.
    """
    found: list[int] = []
    for size in sorted({min(size, most) for size in wanted} - {0}):
        if size <= DENSE or size == most or not found or size >= apart * found[-1]:
            found.append(size)
    return found


def _description(requests: int, rows: int) -> BatchExecutionDescriptor:
    return BatchExecutionDescriptor(
        cg_mode=CUDAGraphMode.FULL,
        num_tokens=requests * rows,
        num_reqs=requests,
        uniform_token_count=rows,
    )
