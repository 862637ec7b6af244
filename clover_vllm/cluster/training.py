"""`clover-vllm train --ray-workers N`: each worker of Ray Train does what a process of torchrun does.

Ray places the workers on its hosts, connects them, and starts all of them again where one is lost; they go on from the
last whole checkpoint, which they find by themselves in `--output`. Ray's own checkpoints are not used: the same run
continues under torchrun with as many processes.
"""

from __future__ import annotations

import logging
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.base.provenance import provenance
from clover_vllm.cluster.through_ray import environment
from clover_vllm.train.settings import TrainSettings

RESTARTS = 3
"""Times in a run that Ray starts the workers again after it has lost one."""

TRACKERS = ("WANDB_", "MLFLOW_", "TENSORBOARD_", "OMP_")
"""Beginnings of variables that training reads, beside `environment`'s."""


def train_on_ray(settings: TrainSettings) -> dict[str, Any]:
    """Train on a cluster.

    Returns:
        the run's summary, as `train.trainer.train` does.

    Raises:
        UserError: anything that the user can mend.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from clover_vllm.train.trainer import check_settings

    workers = settings.ray_workers
    assert workers is not None
    settings = _absolute(settings)
    check_settings(settings)
    ray.init(ignore_reinit_error=True, logging_level=logging.WARNING, runtime_env=environment(*TRACKERS))
    on_gpus = _have_gpus(ray.cluster_resources(), workers)
    refusal = settings.output / f"refusal-{uuid.uuid4().hex}"
    trainer = TorchTrainer(
        _work,
        train_loop_config={"settings": settings, "made": provenance(), "refusal": refusal},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpus),
        run_config=RunConfig(
            name="ray", storage_path=str(settings.output), failure_config=FailureConfig(max_failures=RESTARTS)
        ),
    )
    try:
        summary: dict[str, Any] = trainer.fit().return_value
    except TrainingFailedError as error:
        if refusal.exists():
            text = refusal.read_text()
            refusal.unlink()
            raise UserError(text) from error
        last = str(error).strip().splitlines()[-1]
        raise UserError(
            f"Training ended on the cluster, though it was started up to {RESTARTS} times again: {last}"
        ) from error
    return summary


def _have_gpus(resources: dict[str, float], workers: int) -> bool:
    """Whether every worker gets a GPU, rather than a core.

    Raises:
        UserError: there are too few of either.
    """
    gpus, cores = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    if 0 < gpus < workers or cores < workers:
        raise UserError(
            f"--ray-workers is {workers}; the cluster has {gpus:g} GPUs and {cores:g} cores. Each worker takes a core, and "
            "a GPU if there are any."
        )
    return gpus > 0


def _absolute(settings: TrainSettings) -> TrainSettings:
    """Workers run in folders of their own."""
    paths = {
        name: value.resolve()
        for name in ("output", "init_from", "cache")
        if (value := getattr(settings, name)) is not None
    }
    target = str(Path(settings.target).resolve()) if Path(settings.target).is_dir() else settings.target
    return replace(settings, target=target, data=[path.resolve() for path in settings.data], **paths)


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """What a worker runs. Ray starts workers again whatever has ended them: what one refused is refused at once then."""
    from clover_vllm.train.trainer import train

    refusal: Path = config["refusal"]
    if refusal.exists():
        raise UserError(refusal.read_text())
    try:
        return train(config["settings"], config["made"])
    except UserError as error:
        refusal.write_text(str(error))
        raise
