"""Time of a step with trees of several sizes beside plain decoding, and tokens per second, with forced acceptance.

An untrained target and head of a real model's sizes take the time of trained ones. What is accepted is forced, so the
tokens per second say what a head would bring that has as many nodes accepted, and nothing of any head.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clover_vllm.bench.gpu.cases import Json, Machine, Report, run_case
from clover_vllm.bench.gpu.decoding import Decoding
from clover_vllm.bench.gpu.sections import Sections
from clover_vllm.bench.gpu.shapes import METHODS, MODELS, Models

PROMPT = 32
"""Tokens of a prompt end to end, where reading it counts too."""

ON_GPU = {
    "counts": [1, 8, 32, 128, 256],
    "points": [[512, [128, 32, 8, 1]], [4096, [32, 8, 1]]],
    "steps": 16,
    "longest": 5632,
    "answer": 160,
    "ends": [256, 128, 32, 8, 1],
}
QUICK = {**ON_GPU, "counts": [1, 8, 32], "points": [[512, [32, 8, 1]], [4096, [8, 1]]], "ends": [32, 8, 1]}
TINY = {
    "counts": [1, 2],
    "points": [[16, [2, 1]]],
    "steps": 2,
    "longest": 256,
    "answer": 8,
    "ends": [2, 1],
}
"""Requests that run together; tokens of context, and of how many requests; steps that are timed; most tokens of a
request; tokens of an answer end to end, and of how many requests at a time."""


def check_speed(output: Path, machine: Machine, models: Models, compiled: bool = False) -> bool:
    """Measure all methods into `gpu-speed.json` of a folder.

    Returns:
        whether none failed.
    """
    load = TINY if models.is_tiny else QUICK if machine.quick else ON_GPU
    methods = METHODS[:3] if models.is_tiny or machine.quick else METHODS
    settings = {
        "model": asdict(MODELS[models.shape]),
        "shape": models.shape,
        "compiled": compiled,
        "acceptance": "forced",
        "clock": "the host's, in Triton's interpreter" if machine.interpret else "CUDA events, host",
        **load,
    }
    report = Report(output / "gpu-speed.json", settings)
    for i, method in enumerate(methods):
        spec = {
            **vars(models),
            "method": str(method),
            "dtype": models.dtype,
            "compiled": compiled,
            **load,
        }
        share = machine.left / (len(methods) - i)
        found = run_case(time_steps, spec, machine, max(150.0, 1.5 * share))
        found["accepted"] = {"forced": method.accepted}
        against_plain(found, report.cases.get("plain", {}))
        report.add(str(method), found)
    return report.ok


def against_plain(found: Json, plain: Json) -> None:
    """Add what a method's steps cost in plain steps, and its speed-up end to end."""
    for name, point in found.get("points", {}).items():
        base = plain.get("points", {}).get(name)
        if base is None or "drafting" not in point["parts ms"]:
            continue
        drafting = point["parts ms"]["drafting"]
        point["verify / plain"] = (point["step ms"] - drafting) / base["step ms"]
        point["draft / plain"] = drafting / base["step ms"]
        point["step / plain"] = point["step ms"] / base["step ms"]
        point["forward / plain"] = (
            point["parts ms"]["target's forward"] / base["parts ms"]["target's forward"]
        )
    for name, rate in found.get("tokens per second", {}).items():
        base = plain.get("tokens per second", {}).get(name)
        if base:
            found.setdefault("speed-up, forced", {})[name] = rate / base


def time_steps(spec: Json, say: Callable[..., None]) -> None:
    """In a process of its own: one method.

    Args:
        spec: see `decoding.engine_arguments`, and the load.
        say: keeps what is found.
    """
    import torch

    from clover_vllm.bench.gpu.flash import flash_attention_problem

    problem = flash_attention_problem()
    spec["attention"] = "TRITON_ATTN" if problem else "FLASH_ATTN"
    started = time.monotonic()
    decoding = Decoding(spec)
    say(
        **{
            "start seconds": round(time.monotonic() - started, 1),
            "attention": spec["attention"],
            "FLASH_ATTN": problem or "used",
            "device": torch.cuda.get_device_name() if decoding.on_gpu else "CPU",
            "runner": type(decoding.runner).__name__,
            "memory GiB": torch.cuda.memory_allocated() / 2**30 if decoding.on_gpu else None,
        }
    )
    points: Json = {}
    for context, counts in spec["points"]:
        names = decoding.add(counts[0], context, spec["longest"] - context - 1)
        decoding.until_all_decode()
        for count in counts:
            names = decoding.keep(names, count)
            points[f"{count} x {context}"] = point(decoding, spec["steps"])
            say(points=points)
        decoding.keep(names, 0)
    rates: Json = {}
    for count in spec["ends"]:
        decoding.add(count, PROMPT, 8)
        decoding.finish(8)  # compiles what this many requests need
        decoding.add(count, PROMPT, spec["answer"])
        rates[str(count)] = decoding.finish(count * spec["answer"])
        say(**{"tokens per second": rates})


def point(decoding: Decoding, steps: int) -> Json:
    """Time of a step and of its parts, each over some steps of their own."""
    seconds, emitted = decoding.steps(steps)
    with Sections(decoding.runner, decoding.on_gpu) as sections:
        apart, _ = decoding.steps(steps // 2)
        parts: dict[str, Any] = sections.milliseconds(steps // 2)
    return {
        "step ms": 1e3 * seconds,
        "step ms with events": 1e3 * apart,
        "parts ms": parts,
        "tokens per step and request": emitted,
        "context": decoding.context(),
    }
