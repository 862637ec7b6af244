"""vLLM's workers with our runner; `ParallelConfig.worker_cls` names them."""

from __future__ import annotations

import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from clover_vllm.engine.hooks import forget_cached_backends, install_logits_processors, making_runner
from clover_vllm.engine.runner import CloverCPUModelRunner, CloverRunner
from clover_vllm.engine.support import refuse


class CloverCPUWorker(CPUWorker):
    """A worker of vLLM's CPU build."""

    def init_device(self) -> None:
        """As the base class, with our attention backend and runner."""
        _refuse_v2(self.vllm_config.use_v2_model_runner)
        install_logits_processors()
        register_backend(
            AttentionBackendEnum.CPU_ATTN, "clover_vllm.engine.backends.cpu.TreeCPUAttentionBackend"
        )
        forget_cached_backends()
        with making_runner(CloverCPUModelRunner):
            super().init_device()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Measures costs; then as the base class, which sets the random seed last."""
        self.model_runner.speculation.measure()
        return super().compile_or_warm_up_model()

    def _make_model_runner(self) -> GPUModelRunner:
        """Asked by a vLLM with our patches."""
        return CloverCPUModelRunner(self.vllm_config, torch.device("cpu"))


class CloverGPUWorker(Worker):
    """A worker on a GPU, with the V1 runner."""

    def _make_model_runner(self) -> GPUModelRunner:
        _refuse_v2(self.vllm_config.use_v2_model_runner)
        install_logits_processors()
        return CloverRunner(self.vllm_config, self.device)


def _refuse_v2(use_v2_model_runner: bool) -> None:
    if use_v2_model_runner:
        raise refuse("vLLM's V2 model runner")
