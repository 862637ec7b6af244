"""vLLM as it runs on a GPU, on a CPU: its V2 runner and its Triton kernels, in Triton's interpreter.

So the code for GPUs is compared with plain vLLM without one. What this cannot show is whether kernels compile, CUDA
graphs, streams, and speed.
"""

from __future__ import annotations

import inspect
import os
from typing import Any


def interpret() -> None:
    """Let this process's vLLM interpret Triton kernels and schedule as on a GPU. Called before vLLM is imported.

    vLLM's CPU build takes Triton for absent unless Triton has a backend called "cpu" (`vllm.triton_utils.importing`),
    and then runs its V2 model runner.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from triton.backends import backends
    from triton.runtime import interpreter

    backends["cpu"] = _Backend
    options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )  # of each sum and product; half of the time
    interpreter.interpreter_builder.options = options
    remember_builtins()
    # Asked for tile sizes by `triton_reshape_and_cache_flash`.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    _schedule_ahead()

    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False  # the interpreter does not know all that its kernel does
    triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 0  # cut no short context in 16 parts, which take turns here


def remember_builtins() -> None:
    """Triton lists all names of its language modules at each call of each kernel's function: a fifth of the time."""
    from triton.runtime import interpreter

    known: dict[Any, list[str]] = {}
    is_builtin = interpreter.tl.core.is_builtin

    def patch_builtin(module: Any, builder: Any, scope: Any) -> None:
        if module not in known:
            known[module] = [name for name, member in inspect.getmembers(module) if is_builtin(member)]
        for name in known[module]:
            member = getattr(module, name)
            if is_builtin(member):  # not inside another call, which has patched it
                interpreter._patch_attr(module, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


class _Backend:
    """Stands for a `triton.backends.Backend`; the interpreter compiles nothing."""

    class driver:
        @staticmethod
        def is_active() -> bool:
            return True


def _schedule_ahead() -> None:
    """Keep asynchronous scheduling, which vLLM switches off on a CPU, where nothing is gained by it."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        chosen = vllm_config.scheduler_config.async_scheduling
        original(vllm_config)
        vllm_config.scheduler_config.async_scheduling = chosen

    CpuPlatform.check_and_update_config = staticmethod(check_and_update_config)
