"""`clover-vllm gpu-check`: its parts in the order in which they tell most."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

from clover_vllm.base.errors import UserError
from clover_vllm.bench.gpu.cases import Json, Machine, Report, run_case
from clover_vllm.bench.gpu.shapes import MODELS, Models
from clover_vllm.check.settings import GpuCheckSettings

SECONDS = {"kernels": 150.0, "step": 200.0, "exactness": 400.0, "speed": 900.0}
"""Parts in order, and the most that each takes by default: an engine needs 45 seconds to start, with a head longer."""

ENDING = 15.0
"""Seconds that the last case of the kernels may take."""


def run_parts(settings: GpuCheckSettings) -> list[str]:
    """Run parts, one after the other.

    Returns:
        the parts that failed.

    Raises:
        UserError: an unknown part or shape, or no GPU.
    """
    parts, interpreter = settings.parts or [], settings.interpreter
    known = [part for part in SECONDS if part != "kernels" or not interpreter]
    if unknown := [part for part in parts if part not in known]:
        raise UserError(f"There is no part {unknown[0]!r}; choose from {', '.join(known)}.")
    if settings.shape not in MODELS:
        raise UserError(f"--shape is {settings.shape!r}; choose from {', '.join(MODELS)}.")
    if not interpreter:
        _check_gpu()
    failed = []
    with tempfile.TemporaryDirectory() as made:

        @cache
        def models() -> Models:
            from clover_vllm.check.gpu_models import make_models

            return make_models("tiny" if interpreter else settings.shape, Path(made))

        for part in [part for part in known if part in parts or not parts]:
            most = settings.seconds or (600.0 if interpreter else SECONDS[part])
            machine = Machine(time.monotonic() + most, interpreter, settings.quick)
            try:
                ok = _run_part(part, settings, machine, models)
            except Exception:  # the next part may tell something
                traceback.print_exc()
                Report(settings.output / f"gpu-{part}-failed.json", {}).add(
                    part, {"error": traceback.format_exc()}
                )
                ok = False
            if not ok:
                failed.append(part)
    return failed


def _run_part(part: str, settings: GpuCheckSettings, machine: Machine, models: Callable[[], Models]) -> bool:
    output = settings.output
    if part == "kernels":
        spec = {"output": str(output.absolute()), "quick": machine.quick}
        found = run_case(run_kernels, spec, machine, machine.left)
        if "error" in found:
            Report(output / "gpu-kernels-failed.json", {}).add(part, found)
        return bool(found.get("ok"))
    if part == "step":
        from clover_vllm.bench.gpu.step import check_step

        return check_step(output, machine, models())
    if part == "exactness":
        from clover_vllm.check.exactness import check_exactness

        return check_exactness(output, machine)
    from clover_vllm.bench.gpu.speed import check_speed

    return check_speed(output, machine, models(), settings.compiled)


def run_kernels(spec: Json, say: Callable[..., None]) -> None:
    """In a process of its own, whose memory on the GPU the engines after it need."""
    from clover_vllm.bench.gpu.kernels import check_kernels

    say(ok=bool(check_kernels(Path(spec["output"]), spec["quick"], max(1.0, spec["seconds"] - ENDING))))


def _check_gpu() -> None:
    """
    Raises:
        UserError: PyTorch finds no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU here; --interpreter runs what a CPU can show.")
