"""CUDA graphs on a CPU: what is launched while one is captured is written down, and launched again at each replay.

As on a GPU, a replay runs no Python of the captured function, sees the same tensors at the same places, and reads
nothing on the host. So a graph that misses an input is seen to give what it gave at its capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpretedFunction

_recording: list[Recorded] = []
_run = InterpretedFunction.run


class Recorded(TorchDispatchMode):
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Callable[[], None]] = []
        self.replays = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert op.namespace != "vllm", f"{op} hides what it launches"
        assert not any(name in str(op) for name in ("item", "nonzero", "_local_scalar")), f"{op} waits"
        made = op(*args, **kwargs)
        given = [part for part in tree_flatten((args, kwargs))[0] if isinstance(part, torch.Tensor)]
        places = {part.untyped_storage().data_ptr() for part in given}
        outs = [part for part in tree_flatten(made)[0] if isinstance(part, torch.Tensor)]
        assert all(part.device.type == "cpu" for part in outs)
        fresh = [out.untyped_storage().data_ptr() not in places for out in outs]
        if op._schema.is_mutable or any(fresh):  # else a view

            def launch() -> None:
                again = [
                    part for part in tree_flatten(op(*args, **kwargs))[0] if isinstance(part, torch.Tensor)
                ]
                for out, new, is_fresh in zip(outs, again, fresh, strict=True):
                    if is_fresh:
                        out.copy_(new)

            self.launches.append(launch)
        return made

    def replay(self) -> None:
        assert not _recording
        self.replays += 1
        for launch in self.launches:
            launch()


def _interpret(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    def launch() -> Any:
        with _disable_current_modes():
            return _run(self, *args, grid=grid, warmup=warmup, **kwargs)

    if _recording:
        _recording[-1].launches.append(launch)
    return launch()


@contextmanager
def capturing(graph: Recorded, *_: Any, **__: Any) -> Iterator[None]:
    """Stands for `torch.cuda.graph`."""
    _recording.append(graph)
    try:
        with graph:
            yield
    finally:
        _recording.pop()


InterpretedFunction.run = _interpret


def install() -> None:
    """Let vLLM's `CudaGraphManager` capture on a CPU, in this process."""
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    for owner, name, value in (
        (torch.cuda, "CUDAGraph", Recorded),
        (torch.cuda, "graph", capturing),
        (torch.accelerator, "empty_cache", lambda: None),
        (torch.accelerator, "get_memory_info", lambda: (0, 0)),
    ):
        setattr(owner, name, value)
    cudagraph_utils.graph_capture = lambda *_, **__: nullcontext()
    cudagraph_utils.capture_pool = lambda *_: nullcontext()
    cudagraph_utils.current_stream = lambda: None
    cudagraph_utils.current_platform.get_global_graph_pool = lambda: None
    model_runner.lock_workspace = lambda: None


def capture(runner: Any, sizes: list[int]) -> None:
    """Capture graphs of these sizes for a V2 runner that serves nothing and whose prefix cache is empty."""
    from vllm.config.compilation import CUDAGraphMode

    config = runner.compilation_config
    config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    config.cudagraph_capture_sizes, config.max_cudagraph_capture_size = sizes, max(sizes)
    for layer in config.static_forward_context.values():
        layer.use_direct_call = True
    runner.initialize_kv_cache(runner.kv_cache_config)
    runner.capture_model()


def replays(runner: Any) -> dict[str, dict[int, dict[int, int]]]:
    """By part of a step, rows per request and number of requests that a graph is for, how often it was replayed."""
    speculator = runner.speculator
    managers = {
        "target": runner.cudagraph_manager,
        "block": speculator._block_graphs,
        "growth": speculator._growth_graphs,
    }
    found: dict[str, dict[int, dict[int, int]]] = {}
    for name, manager in managers.items():
        for graph, made in manager.graphs.items():
            of_part = found.setdefault(name, {}).setdefault(graph.uniform_token_count, {})
            of_part[graph.num_reqs] = made.replays
    return found
