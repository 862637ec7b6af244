"""What `clover-vllm replicas` is asked for. Light: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

MOST_REQUESTS = 16
"""Requests that a replica holds, where nobody says how many."""


@dataclass(frozen=True)
class ReplicasSettings:
    """What `clover-vllm replicas` was asked for.

    Args:
        measured: What `clover-vllm bench --output` wrote, with Clover-2 among the methods.
        tokens: Length of an answer, tokens, on average.
        rate: Requests per second, of all replicas together.
        seconds: Longest time that an answer may take, on average.
        most: Requests that a replica holds at a time (max_num_seqs).
    """

    measured: Path
    tokens: Annotated[float, typer.Option(min=1)] = 150.0
    rate: Annotated[float, typer.Option(min=1e-6)] = 10.0
    seconds: Annotated[float, typer.Option(min=0.001)] = 20.0
    most: Annotated[int, typer.Option(min=1)] = MOST_REQUESTS
