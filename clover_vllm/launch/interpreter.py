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
    quicken()
    # Asked for tile sizes by `triton_reshape_and_cache_flash`.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    _schedule_ahead()

    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False  # the interpreter does not know all that its kernel does
    triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 0  # cut no short context in 16 parts, which take turns here


def quicken() -> None:
    """Let Triton's interpreter work out once what depends on nothing that changes, over a third of its time.

    It patches its language modules at each call of each kernel's function, also inside another, lists all their names
    for it, and makes the type, the shape and the number of elements of each intermediate result anew.
    """
    from triton.runtime import interpreter

    language, core = interpreter.tl, interpreter.tl.core
    patch_lang = interpreter._patch_lang
    known: dict[Any, list[str]] = {}

    def patch_where_needed(function: Any) -> Any:
        """Modules are patched whole, so that one name tells whether they are; a call inside another finds them so."""
        used = [value for value in function.__globals__.values() if value is language or value is core]
        patched = used and not any(core.is_builtin(module.load) for module in used)
        return interpreter._LangPatchScope() if patched else patch_lang(function)

    def patch_builtin(module: Any, builder: Any, scope: Any) -> None:
        if module not in known:
            known[module] = [name for name, member in inspect.getmembers(module) if core.is_builtin(member)]
        for name in known[module]:
            member = getattr(module, name)
            if core.is_builtin(member):  # not inside a call that has patched it
                interpreter._patch_attr(module, name, member, builder, scope)

    make_block_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    np_dtype = interpreter._get_np_dtype
    blocks: dict[Any, tuple[Any, ...]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}
    np_dtypes: dict[str, Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape))
        if key not in blocks:
            make_block_type(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in shapes:
            make_tensor(self, handle, type)
            shapes[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[type.name]

    def get_np_dtype(type: Any) -> Any:
        if type.name not in np_dtypes:
            np_dtypes[type.name] = np_dtype(type)
        return np_dtypes[type.name]

    interpreter._patch_lang, interpreter._patch_builtin = patch_where_needed, patch_builtin
    interpreter._get_np_dtype = get_np_dtype
    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


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
