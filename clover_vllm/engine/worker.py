"""vLLM's CPU worker with our runners; `ParallelConfig.worker_cls` names it."""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.worker_base import CompilationTimes

from clover_vllm.engine.hooks import (
    forget_cached_backends,
    install_logits_processors,
    making_runner,
    making_v2_runner,
)
from clover_vllm.engine.runner import CloverCPUModelRunner


class CloverCPUWorker(CPUWorker):
    """A worker of vLLM's CPU build."""

    def init_device(self) -> None:
        """As the base class, with our attention backend and runner."""
        if self.use_v2_model_runner:
            self._init_v2()
            return
        install_logits_processors()
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "clover_vllm.engine.backends.cpu.TreeCPUAttentionBackend"
        )
        forget_cached_backends()
        with making_runner(CloverCPUModelRunner):
            super().init_device()

    def _init_v2(self) -> None:
        """Where Triton is here, its kernels being interpreted: for tests."""
        from clover_vllm.engine.v2.cpu import CloverV2CPURunner

        register_backend(AttentionBackendEnum.CPU_ATTN, "clover_vllm.engine.backends.gpu.TreeTritonBackend")
        forget_cached_backends()
        with making_v2_runner(CloverV2CPURunner):
            super().init_device()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Measures costs; then as the base class, which sets the random seed last."""
        if not self.use_v2_model_runner:
            self.model_runner.speculation.time_costs()
        return super().compile_or_warm_up_model()

    def _make_model_runner(self) -> GPUModelRunner:
        """Asked by a vLLM with our patches."""
        return CloverCPUModelRunner(self.vllm_config, torch.device("cpu"))
