"""What `clover-vllm batch` and `replicas` are asked for. Light: the command line reads it first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from clover_vllm.base.command_line import LEFT_OVER

MOST_REQUESTS = 16
"""Requests that a replica holds, where nobody says how many."""


@dataclass(frozen=True)
class BatchSettings:
    """What `clover-vllm batch` was asked for. `flags` are those of `vllm run-batch`: the target, `--speculative-config` and so on.

    Args:
        input: Lines of OpenAI's batch files, or with a prompt.
        output: File of answers; appears once all are there.
        at_once: Requests that an engine holds at a time.
        ray: Through Ray Data, on the cluster that RAY_ADDRESS names, that this host belongs to, or that is started here.
        replicas: Most engines, with --ray.
        replica_cpus: Cores of an engine, with --ray.
        replica_gpus: GPUs of an engine, with --ray.
    """

    input: Annotated[Path, typer.Argument()]
    output: Annotated[Path, typer.Argument()]
    flags: Annotated[Sequence[str], LEFT_OVER] = ()
    at_once: Annotated[int, typer.Option(min=1)] = 256
    ray: bool = False
    replicas: Annotated[int, typer.Option(min=1)] = 1
    replica_cpus: Annotated[int, typer.Option(min=1)] = 1
    replica_gpus: Annotated[int, typer.Option(min=0)] = 0


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
