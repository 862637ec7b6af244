"""The device, and microseconds on it by replaying CUDA graphs: Python would take longer to launch most kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels are checked. On a CPU Triton interprets them, and what is timed means nothing: for tests."""

ROUNDS = 5
SECONDS = 0.004
"""Each round takes about this long."""
CALLS = 8
"""At least in a graph: launching one takes some microseconds too."""


def workers(threads: int) -> ThreadPoolExecutor:
    """Threads that launch kernels, with two cores each for what PyTorch computes on the CPU."""

    def begin() -> None:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(torch.cuda.current_device())
            torch.set_num_threads(2)

    return ThreadPoolExecutor(threads, initializer=begin)


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """What does all calls again, as one CUDA graph; they have been done once before."""
    for call in calls:
        call()
    if DEVICE.type == "cpu":
        return lambda: [call() for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _seconds(call: Callable[[], object], times: int) -> float:
    """How long `times` calls take on the device, one behind the other."""
    if DEVICE.type == "cpu":
        started = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one call, the median of `ROUNDS`; the calls take turns, so that none finds its data in the L2 cache."""
    enough = list(calls) * -(-CALLS // len(calls)) if DEVICE.type == "cuda" else list(calls)
    replay = captured(enough)
    times = min(1000, max(1, round(SECONDS / max(_seconds(replay, 1), 1e-6))))
    taken = statistics.median(_seconds(replay, times) for _ in range(ROUNDS if DEVICE.type == "cuda" else 1))
    return taken / times / len(enough) * 1e6
