"""What `clover-vllm demo` and `trees` are asked for. Light: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer


@dataclass
class DemoSettings:
    """What `clover-vllm demo` was asked for.

    Args:
        prompts: Number of prompts.
        tokens: Longest answer, tokens.
    """

    prompts: Annotated[int, typer.Option(min=1, max=6)] = 4
    tokens: Annotated[int, typer.Option(min=16, max=1024)] = 128


@dataclass
class TreesSettings:
    """What `clover-vllm trees` was asked for.

    Args:
        prompts: Number of prompts.
        tokens: Longest answer, tokens.
        steps: Draft trees shown per prompt.
    """

    prompts: Annotated[int, typer.Option(min=1, max=6)] = 4
    tokens: Annotated[int, typer.Option(min=2, max=2048)] = 96
    steps: Annotated[int, typer.Option(min=0)] = 3
