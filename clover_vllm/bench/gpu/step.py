"""One engine with trees, step by step: does our code wait for the device, what do its parts take, how much is launched."""

from __future__ import annotations

import json
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clover_vllm.bench.gpu.cases import Json, Machine, Report, run_case
from clover_vllm.bench.gpu.decoding import Decoding
from clover_vllm.bench.gpu.sections import Sections, read_trace
from clover_vllm.bench.gpu.shapes import Models

OURS = ("/clover_vllm/engine/", "/clover_vllm/attention/", "/clover_vllm/tree/")
"""Folders whose code must not wait."""

WATCHED = "tree of 16"
"""The method."""

ON_GPU = {"counts": [1, 8], "requests": [8, 1], "context": 512, "steps": 12, "longest": 2048}
TINY = {"counts": [1, 2], "requests": [2, 1], "context": 16, "steps": 2, "longest": 256}


def check_step(output: Path, machine: Machine, models: Models) -> bool:
    """Watch an engine with trees of 16 nodes into `gpu-step.json` of a folder.

    Returns:
        whether nothing of ours waited, and nothing failed.
    """
    load = TINY if models.is_tiny else ON_GPU
    report = Report(output / "gpu-step.json", {"shape": models.shape, "acceptance": "forced", **load})
    spec = {
        **vars(models),
        "method": WATCHED,
        "dtype": models.dtype,
        "compiled": False,
        "attention": "TRITON_ATTN",
        **load,
    }
    report.add(WATCHED, run_case(watch, spec, machine, machine.left))
    return report.ok


def watch(spec: Json, say: Callable[..., None]) -> None:
    """In a process of its own: one engine.

    Args:
        spec: see `decoding.engine_arguments`, and the load.
        say: keeps what is found.
    """
    decoding = Decoding(spec)
    names = decoding.add(spec["requests"][0], spec["context"], spec["longest"] - spec["context"] - 1)
    decoding.until_all_decode()
    steps = spec["steps"]
    seconds, emitted = decoding.steps(steps)
    say(**{"step ms": 1e3 * seconds, "tokens per step and request": emitted})
    with waits(decoding) as found:
        decoding.steps(steps)
    say(waits=found, ok=not any(where["ours"] for where in found.values()))
    for count in spec["requests"]:
        names = decoding.keep(names, count)
        with Sections(decoding.runner, decoding.on_gpu) as sections:
            decoding.steps(steps)
            parts = sections.milliseconds(steps)
        say(**{f"parts us, {count} requests": {name: 1e3 * ms for name, ms in parts.items()}})
        say(**{f"trace, {count} requests": trace(decoding, min(steps, 5))})
    try:  # last, since an engine is not whole after an error in a step
        with waits(decoding, mode="error"):
            decoding.steps(4)
        say(**{"error mode": "4 steps passed"})
    except RuntimeError:
        say(**{"error mode": traceback.format_exc()})


@contextmanager
def waits(decoding: Decoding, mode: str = "warn") -> Iterator[dict[str, Json]]:
    """Find what waits for the device in the runner's two calls per step; vLLM waits for its output outside of them.

    Yields:
        by the line that waited, how often, and whether it is ours.
    """
    import torch

    found: dict[str, Json] = {}
    counts: Counter[str] = Counter()
    runner = decoding.runner
    originals = {name: getattr(runner, name) for name in ("execute_model", "sample_tokens")}

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        stack = [frame for frame in traceback.extract_stack() if "/warnings.py" not in frame.filename][:-1]
        way = [
            frame for frame in stack if "/vllm/" in frame.filename or any(o in frame.filename for o in OURS)
        ]
        line = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(way[-4:]))
        counts[line] += 1
        found[line] = {"times": counts[line], "ours": is_ours(way)}

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if decoding.on_gpu:
                torch.cuda.set_sync_debug_mode(mode)
            try:
                return originals[name](*args, **kwargs)
            finally:
                if decoding.on_gpu:
                    torch.cuda.set_sync_debug_mode("default")

        return call

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown, warnings.showwarning = warnings.showwarning, note
        for name in originals:
            setattr(runner, name, watched(name))
        try:
            yield found
        finally:
            warnings.showwarning = shown
            for name, original in originals.items():
                setattr(runner, name, original)


def is_ours(way: list[traceback.FrameSummary]) -> bool:
    """Whether the innermost of these lines, apart from vLLM's utilities, is of our code."""
    callers = [frame.filename for frame in way if "/vllm/utils/" not in frame.filename]
    return bool(callers) and any(folder in callers[-1] for folder in OURS)


def trace(decoding: Decoding, steps: int) -> dict[str, dict[str, float]]:
    """Launches per step, by part."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if decoding.on_gpu else [])]
    with (
        tempfile.TemporaryDirectory() as folder,
        Sections(decoding.runner, decoding.on_gpu, traced=True),
    ):
        with profile(activities=activities) as profiler:
            decoding.steps(steps)
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return read_trace(json.loads(file.read_text()), steps)
