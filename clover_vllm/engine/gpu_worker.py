"""vLLM's GPU worker with our runners; `ParallelConfig.worker_cls` names it.

Apart from the CPU's, since importing `vllm.v1.worker.cpu_worker` replaces CUDA streams and events by placeholders.
"""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from clover_vllm.engine.hooks import forget_cached_backends, install_logits_processors
from clover_vllm.engine.support import refuse_trees


class CloverGPUWorker(Worker):
    """A worker on a GPU: the V2 runner, or with chains alone the V1 runner."""

    def _make_model_runner(self) -> GPUModelRunner:
        if self.use_v2_model_runner:
            from clover_vllm.engine.v2.runner import CloverV2Runner

            for backend, name in (("TRITON_ATTN", "TreeTritonBackend"), ("FLASH_ATTN", "TreeFlashBackend")):
                register_backend(AttentionBackendEnum[backend], f"clover_vllm.engine.backends.gpu.{name}")
            forget_cached_backends()
            return CloverV2Runner(self.vllm_config, self.device)
        from clover_vllm.engine.runner import CloverRunner

        speculative = self.vllm_config.speculative_config
        if speculative.clover.tree != "chain" or not speculative.disable_padded_drafter_batch:
            # vLLM chose V1 for another of its settings, after the configuration was made for V2.
            raise refuse_trees("the V1 model runner on a GPU")
        install_logits_processors()
        return CloverRunner(self.vllm_config, self.device)
