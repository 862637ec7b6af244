"""`clover-vllm data --ray`: engines of a cluster that share the shards.

A shard begins with an empty prefix cache and has its own seeds, so that it does not matter which engine writes it, or that
Ray asks another one for it where an actor dies.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.cluster.cores import claim_cores
from clover_vllm.cluster.through_ray import environment
from clover_vllm.launch.environment import is_cpu_build, prepare
from clover_vllm.launch.reaper import start_reaper
from clover_vllm.train.generate import Answered, ShardWriter, engine_options, generate
from clover_vllm.train.settings import DataSettings


def generate_on_ray(settings: DataSettings) -> dict[str, Any]:
    """As `train.generate.generate`, on a cluster.

    Raises:
        UserError: anything that the user can mend.
    """
    target = settings.target
    if Path(target).is_dir():  # actors run in folders of their own
        target = str(Path(target).resolve())
    return generate(replace(settings, target=target, output=settings.output.resolve()), _write_on_ray)


class _Engine:
    """An actor."""

    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings
        self._writer: ShardWriter | None = None

    def write(self, path: Path, requests: Sequence[Any]) -> tuple[int, int]:
        """Answers of a shard, and their tokens."""
        if (
            self._writer is None
        ):  # here rather than in `__init__`, so that what vLLM refuses reaches the caller
            if is_cpu_build():
                ranks = int(engine_options(self._settings.flags).get("tensor_parallel_size", 1))
                os.environ["VLLM_CPU_OMP_THREADS_BIND"] = claim_cores(self._settings.replica_cpus, ranks)
            prepare()
            self._reaper = start_reaper()
            self._writer = ShardWriter(self._settings)
        return len(requests), self._writer.write(path, requests, lambda *_: None)


def _write_on_ray(
    settings: DataSettings, missing: Mapping[Path, Sequence[Any]], answered: Answered
) -> dict[str, Any]:
    """`generate`'s `Write`.

    Raises:
        UserError: the cluster is too small, or an engine refuses its settings.
    """
    import ray
    from ray.exceptions import RayTaskError
    from ray.util import ActorPool

    ray.init(
        ignore_reinit_error=True,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env={"env_vars": environment()},
    )
    engines = min(settings.replicas, len(missing))
    _check_resources(settings, ray.cluster_resources(), engines)
    # An actor that died is started again, and asked again for the shard that it was at.
    actor = ray.remote(
        num_cpus=settings.replica_cpus,
        num_gpus=settings.replica_gpus,
        max_restarts=-1,
        max_task_retries=-1,
    )(_Engine)
    pool = ActorPool([actor.remote(settings) for _ in range(engines)])
    shards = iter(missing.items())
    started = time.monotonic()

    def hand_out() -> None:
        if settings.seconds is not None and time.monotonic() - started > settings.seconds:
            return
        if (shard := next(shards, None)) is not None:
            pool.submit(lambda engine, own: engine.write.remote(*own), shard)

    answered(0, 0)
    for _ in range(engines):
        hand_out()
    while pool.has_next():
        try:
            answered(*pool.get_next_unordered())
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        hand_out()
    return {"engines": engines}


def _check_resources(settings: DataSettings, resources: Mapping[str, float], engines: int) -> None:
    """
    Raises:
        UserError: not all engines find a place at a time.
    """
    cores, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if engines * settings.replica_cpus > cores or engines * settings.replica_gpus > gpus:
        raise UserError(
            f"{engines} engines with {settings.replica_cpus} cores and {settings.replica_gpus} GPUs each do not fit the "
            f"cluster, which has {cores:g} cores and {gpus:g} GPUs; ask for fewer with --replicas or --replica-cpus."
        )
