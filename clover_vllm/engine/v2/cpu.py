"""The V2 runner of vLLM's CPU build, whose kernels Triton interprets."""

from __future__ import annotations

from vllm.v1.worker.cpu.model_runner import CPUModelRunner

from clover_vllm.engine.v2.runner import CloverV2Runner


class CloverV2CPURunner(CloverV2Runner, CPUModelRunner):
    """For tests without a GPU."""
