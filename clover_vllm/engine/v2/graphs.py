"""CUDA graphs of drafting, one per padded number of requests, made and kept by vLLM's own machinery.

vLLM captures them behind its own (`GPUModelRunner.capture_model`), in the same pool of memory, and counts that memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

GROWTH = 1.25
"""Least ratio between numbers of requests that have a graph, beyond `DENSE`."""

DENSE = 8
"""Up to this many requests, all of vLLM's sizes have a graph."""


class DraftGraphs(CudaGraphManager):
    """Graphs of work that has as many rows for each request of a batch."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, is_on: bool, rows: Sequence[int], most_rows: int
    ) -> None:
        """
        Args:
            vllm_config: of the engine.
            device: of the engine.
            is_on: whether there are graphs at all.
            rows: numbers of rows per request that occur.
            most_rows: of a graph.
        """
        self._rows, self._most_rows = sorted(set(rows)), most_rows
        self._sizes: dict[int, list[int]] = {}  # by rows per request, numbers of requests, rising
        mode = CUDAGraphMode.FULL_DECODE_ONLY if is_on else CUDAGraphMode.NONE
        super().__init__(vllm_config, device, mode, decode_query_len=self._rows[-1])

    def _init_candidates(self) -> None:
        if not self.cudagraph_mode:
            return
        captured = self.compilation_config.cudagraph_capture_sizes or []
        for rows in self._rows:
            self._sizes[rows] = request_sizes(captured, min(self.max_num_reqs, self._most_rows // rows))
        found = [_description(size, rows) for rows in self._rows for size in self._sizes[rows]]
        if found:
            self._capture_descs[CUDAGraphMode.FULL] = sorted(found, key=lambda d: d.num_tokens, reverse=True)

    def find(self, requests: int, rows: int) -> BatchExecutionDescriptor | None:
        """The smallest graph for a batch, or None."""
        sizes = self._sizes.get(rows, [])
        index = bisect_left(sizes, requests)
        if not self._graphs_captured or index == len(sizes):
            return None
        return _description(sizes[index], rows)


def request_sizes(capture_sizes: Sequence[int], most: int) -> list[int]:
    """Numbers of requests that have a graph: of vLLM's sizes those that lie apart, and at the end `most` itself.

    Args:
        capture_sizes: vLLM's.
        most: requests that run at once; 0 if none have a graph.
    """
    found: list[int] = []
    for size in sorted({min(size, most) for size in capture_sizes} - {0}):
        if size <= DENSE or size == most or not found or size >= GROWTH * found[-1]:
            found.append(size)
    return found


def _description(requests: int, rows: int) -> BatchExecutionDescriptor:
    return BatchExecutionDescriptor(
        cg_mode=CUDAGraphMode.FULL,
        num_tokens=requests * rows,
        num_reqs=requests,
        uniform_token_count=rows,
    )
