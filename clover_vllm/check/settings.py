"""What `clover-vllm torture` and `gpu-check` are asked for. Light: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class TortureSettings:
    """What `clover-vllm torture` was asked for.

    Args:
        requests: Requests in all.
        minutes: How long, instead of --requests.
        seed: Of the first engine; the next one has the next seed.
        per_engine: Requests per engine.
        wave: Requests submitted together.
        interpreter: On vLLM's V2 model runner, the one for GPUs, in Triton's interpreter; smaller engines and requests.
        output: JSON file, or a folder for torture.json (torture-v2.json with --interpreter); a plot goes beside it.
    """

    requests: Annotated[int, typer.Option(min=1)] = 2000
    minutes: Annotated[float | None, typer.Option(min=0.1)] = None
    seed: int = 0
    per_engine: Annotated[int, typer.Option(min=1)] = 300
    wave: Annotated[int, typer.Option(min=1)] = 60
    interpreter: bool = False
    output: Path | None = None


@dataclass(frozen=True)
class GpuCheckSettings:
    """What `clover-vllm gpu-check` was asked for. `shape` is of the model for step and speed.

    Args:
        parts: kernels, step, exactness, speed; all of them by default.
        output: Folder for gpu-PART.json.
        seconds: Most seconds of each part, instead of its own bound.
        quick: Fewer cases.
        compiled: Speed with torch.compile, as vLLM runs by default.
        interpreter: Without a GPU: tiny engines in Triton's interpreter.
    """

    parts: Annotated[list[str] | None, typer.Argument()] = None
    output: Path = Path("results")
    seconds: Annotated[float | None, typer.Option(min=1)] = None
    quick: bool = False
    compiled: bool = False
    interpreter: bool = False
    shape: Annotated[str, typer.Option(hidden=True)] = "8b"
