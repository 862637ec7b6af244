"""What `clover-vllm torture` is asked for. Light: the command line reads it first."""

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
