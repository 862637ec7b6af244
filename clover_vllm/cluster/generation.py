"""`clover-vllm data --ray`: engines of a cluster that share the shards.

A shard begins with an empty prefix cache and has its own seeds, so that it does not matter which engine of a kind writes it.
Ray Data hands shards out, starts engines again that died, and gives their shards to others, as it does for `clover-vllm batch`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.cluster.cores import claim_cores
from clover_vllm.cluster.through_ray import connect
from clover_vllm.launch.environment import is_cpu_build, prepare
from clover_vllm.launch.reaper import start_reaper
from clover_vllm.train.generate import ShardWriter, engine_options, generate
from clover_vllm.train.settings import DataSettings


def generate_on_ray(settings: DataSettings) -> dict[str, Any]:
    """As `train.generate.generate`, on a cluster.

    Raises:
        UserError: anything that the user can mend.
    """
    return generate(settings, _write_on_ray)


class Generator:
    """An actor of Ray Data with an engine of its own."""

    def __init__(self, settings: DataSettings, shards: Sequence[tuple[Path, Sequence[Any]]]) -> None:
        """
        Args:
            settings: with paths that hold on every host.
            shards: all of them; rows name them by number.
        """
        self._settings, self._shards = settings, shards
        self._writer: ShardWriter | None = None
        self._began = 0.0

    def __call__(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Column `shard` in; out with `answers` and `tokens`, none of a shard for which there was no time."""
        if self._writer is None:  # not in `__init__`: what vLLM refuses there, Ray would try again
            if is_cpu_build():
                ranks = int(engine_options(self._settings.flags).get("tensor_parallel_size", 1))
                os.environ["VLLM_CPU_OMP_THREADS_BIND"] = claim_cores(self._settings.replica_cpus, ranks)
            prepare()
            self._reaper = start_reaper()
            self._writer = ShardWriter(self._settings)
            self._began = time.monotonic()
        for number in block["shard"].tolist():
            path, requests = self._shards[number]
            seconds = self._settings.seconds
            if seconds is not None and time.monotonic() - self._began > seconds:
                yield {"shard": [number], "answers": [0], "tokens": [0]}
                continue
            counted = [tokens for _, tokens in self._writer.write(path, requests)]
            yield {"shard": [number], "answers": [len(counted)], "tokens": [sum(counted)]}


def _write_on_ray(settings: DataSettings, missing: Mapping[Path, Sequence[Any]]) -> Iterator[tuple[int, int]]:
    """`generate`'s `Write`.

    Raises:
        UserError: no host has room for an engine, one refuses its settings, or `output` is not a folder of all hosts.
    """
    import ray
    import ray.data

    if Path(settings.target).is_dir():  # actors run in folders of their own
        settings = replace(settings, target=str(Path(settings.target).resolve()))
    shards = [(path.resolve(), requests) for path, requests in missing.items()]
    connect(settings.replica_cpus, settings.replica_gpus)
    rows = ray.data.from_items([{"shard": i} for i in range(len(shards))], override_num_blocks=len(shards))
    written = rows.map_batches(
        Generator,
        fn_constructor_kwargs={"settings": settings, "shards": shards},
        batch_size=1,
        concurrency=(1, settings.replicas),
        num_cpus=settings.replica_cpus,
        num_gpus=settings.replica_gpus,
    )
    yield 0, 0
    try:
        for row in written.iter_rows():
            path = shards[int(row["shard"])][0]
            if row["answers"] and not path.exists():
                raise UserError(
                    f"{path} was written on another host; --output must be a folder of all hosts."
                )
            yield int(row["answers"]), int(row["tokens"])
    except ray.exceptions.RayError as error:
        if (refusal := _refusal(error)) is not None:
            raise UserError(str(refusal)) from None
        raise


def _refusal(error: BaseException | None) -> UserError | None:
    """The UserError that an actor raised, under what Ray wraps around it."""
    while error is not None:
        if type(error) is UserError:
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
