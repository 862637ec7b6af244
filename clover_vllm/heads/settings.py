"""What `clover-vllm convert` is asked for. Light: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass
class ConvertSettings:
    """What `clover-vllm convert` was asked for.

    Args:
        source: Folder of a published Clover-2, Medusa or EAGLE-1 checkpoint.
        output: Head folder to write.
        target: Target to check the head against, and to record in it.
    """

    source: Annotated[Path, typer.Argument()]
    output: Annotated[Path, typer.Argument()]
    target: str | None = None
