"""vLLM's Triton kernels on a CPU, in Triton's interpreter, so that code for GPUs is tested without one."""

from __future__ import annotations

import os


def interpret() -> None:
    """Let this process's vLLM run its Triton kernels, ours among them, interpreted.

    Called before vLLM is imported: its CPU build takes Triton for absent unless Triton has a backend called "cpu"
    (`vllm.triton_utils.importing`).
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton.backends import backends

    backends["cpu"] = _Backend  # type: ignore[assignment]
    # Asked for tile sizes by `triton_reshape_and_cache_flash`.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


class _Backend:
    """Stands for a `triton.backends.Backend`; the interpreter compiles nothing."""

    class driver:
        @staticmethod
        def is_active() -> bool:
            return True
