"""Where a step's time goes: parts of the runner between two events on the GPU, or in a profiler's trace."""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]

PREFIX = "clover: "
"""Of the parts' names in a trace."""

Part = tuple[str, Any, str]
"""Name, the object or module that has it, attribute."""


def parts_of(runner: Any) -> list[Part]:
    """What is measured in a V2 runner; some of it lies within other parts. Chains have no compaction."""
    found: list[Part] = [
        ("attention metadata", runner, "prepare_attn"),
        ("logits, sampling, walk, compaction", runner, "sample"),
    ]
    if not hasattr(runner, "trees"):  # plain vLLM's
        return found
    speculator, scorer = runner.speculator, runner.rejection_sampler
    found += [
        ("sampling and walk", scorer, "_verify"),
        ("walk", importlib.import_module(type(scorer).__module__), "walk_trees"),
        ("lay_out", runner.trees, "lay_out"),
        ("drafting", speculator, "propose"),
        ("layout", importlib.import_module(type(speculator.rows).__module__), "lay_out_head"),
        # The block and growth are launched one by one, or as a graph.
        ("head's block", speculator, "_run_block"),
        ("head's block", speculator._block_graphs, "run_fullgraph"),
        ("growth", speculator, "_run_growth"),
        ("growth", speculator._growth_graphs, "run_fullgraph"),
    ]
    return found + ([("compaction", runner._rows, "move_accepted")] if runner._rows is not None else [])


class Sections:
    """Measures parts while its context lasts."""

    def __init__(self, runner: Any, on_gpu: bool, traced: bool = False) -> None:
        """
        Args:
            runner: of an engine in this process.
            on_gpu: by CUDA events; else by the host's clock.
            traced: as ranges in a trace of `torch.profiler`, instead.
        """
        self._runner, self._on_gpu, self._traced = runner, on_gpu, traced
        self._times: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._undo: list[Callable[[], None]] = []
        self._forward: Any = None

    def __enter__(self) -> Sections:
        for name, owner, attribute in parts_of(self._runner):
            self._wrap(owner, attribute, *self._around(name))
        # The forward pass lies between the preparation of its inputs and the end of `execute_model`.
        begin, end = self._around("target's forward")

        def begun() -> None:
            self._forward = begin()

        def ended(_: Any) -> None:
            if self._forward is not None:
                end(self._forward)
            self._forward = None

        self._wrap(self._runner.model_state, "prepare_inputs", lambda: None, lambda _: begun())
        self._wrap(self._runner, "execute_model", lambda: None, ended)
        return self

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()

    def milliseconds(self, steps: int) -> dict[str, float]:
        """Per step, by part. Waits for the device."""
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
        return {
            name: sum(
                start.elapsed_time(end) if self._on_gpu else 1e3 * (end - start) for start, end in times
            )
            / steps
            for name, times in self._times.items()
        }

    def _around(self, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
        import torch

        def begin_range() -> Any:
            entered = torch.profiler.record_function(PREFIX + name)
            entered.__enter__()
            return entered

        def end_range(entered: Any) -> None:
            entered.__exit__(None, None, None)

        if self._traced:
            return begin_range, end_range
        return self._now, lambda start: self._times[name].append((start, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wrap(self, owner: Any, attribute: str, begin: Callable[[], Any], end: Callable[[Any], None]) -> None:
        original = getattr(owner, attribute)
        own = attribute in vars(owner)

        def call(*args: Any, **kwargs: Any) -> Any:
            begun = begin()
            try:
                return original(*args, **kwargs)
            finally:
                end(begun)

        def undo() -> None:
            if own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)

        setattr(owner, attribute, call)
        self._undo.append(undo)


def read_trace(trace: Json, steps: int) -> dict[str, dict[str, float]]:
    """Per step and part of a trace: launches and copies asked for on the host, and microseconds on host and GPU.

    Args:
        trace: of `torch.profiler`, as Chrome's JSON.
        steps: that it is of.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    on_gpu: defaultdict[Any, float] = defaultdict(float)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            on_gpu[event["args"].get("correlation")] += event["dur"]
    asked = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    found: defaultdict[str, dict[str, float]] = defaultdict(
        lambda: {"launches": 0.0, "copies": 0.0, "GPU us": 0.0, "host us": 0.0, "calls": 0.0}
    )
    for part in events:
        if part.get("cat") != "user_annotation" or not str(part["name"]).startswith(PREFIX):
            continue
        counts = found[part["name"].removeprefix(PREFIX)]
        counts["host us"] += part["dur"] / steps
        counts["calls"] += 1 / steps
        for event in asked:
            if event["tid"] == part["tid"] and part["ts"] <= event["ts"] <= part["ts"] + part["dur"]:
                counts["launches"] += ("Launch" in event["name"]) / steps
                counts["copies"] += ("Memcpy" in event["name"] or "Memset" in event["name"]) / steps
                counts["GPU us"] += on_gpu[event["args"].get("correlation")] / steps
    return {name: {key: round(value, 2) for key, value in counts.items()} for name, counts in found.items()}
