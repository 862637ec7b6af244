"""What `clover-vllm target` is asked for. Light: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass
class TargetSettings:
    """What `clover-vllm target` was asked for.

    Args:
        name: `smollm2-135m`, or `smollm2-135m-deep`: the same text at the cost of a model four times its size.
        output: Folder to make instead of the one in CLOVER_HOME.
    """

    name: Annotated[str, typer.Argument()]
    output: Path | None = None
