"""Batches through Ray Data: an engine per actor, which answers lines as `cluster.answering` does on one machine.

`ray.data.llm` would answer prompts through a chain of stages of its own, and with another answer than `vllm run-batch`
where tools, logprobs, several samples or refusals are asked for. So actors run vLLM's `run-batch` code, and Ray Data hands
out the lines, restarts actors that died and gives their lines to others.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from clover_vllm.base.errors import UserError
from clover_vllm.cluster.answering import Answering, EngineDied, answering, parse_flags
from clover_vllm.cluster.cores import claim_cores
from clover_vllm.launch.environment import is_cpu_build, prepare
from clover_vllm.launch.reaper import start_reaper

if TYPE_CHECKING:
    from clover_vllm.cluster.batch import Request
    from clover_vllm.cluster.settings import BatchSettings

BLOCK = 16
"""Lines that are handed to an engine together; what is computed again if it dies."""


class Answerer:
    """An actor of Ray Data with an engine of its own."""

    _start = staticmethod(answering)

    def __init__(self, flags: Sequence[str], cpus: int) -> None:
        """
        Args:
            flags: of `vllm run-batch`.
            cpus: cores of the engine.
        """
        if is_cpu_build():
            ranks = int(parse_flags(flags).tensor_parallel_size)
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = claim_cores(cpus, ranks)
        prepare()
        self._prepare(flags)

    def _prepare(self, flags: Sequence[str]) -> None:
        self._reaper = start_reaper()
        self._flags = flags
        self._stack = AsyncExitStack()
        self._engine: asyncio.Task[Answering] | None = None

    async def __call__(self, block: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Columns `line` and `text` in, `line` and `answer` out."""
        if self._engine is None:  # made here, where the actor's event loop runs
            self._engine = asyncio.create_task(self._stack.enter_async_context(self._start(self._flags)))
        engine = await asyncio.shield(self._engine)
        try:
            answers = await asyncio.gather(*(engine.answer(str(text)) for text in block["text"]))
        except EngineDied:
            os._exit(1)  # Ray starts this actor anew, and gives the block to another meanwhile
        yield {"line": block["line"], "answer": answers}


def answered(
    settings: BatchSettings, requests: Sequence[Request], answerer: type[Answerer] = Answerer
) -> Iterator[tuple[int, str]]:
    """Line numbers with answers as they come, from a cluster."""
    import ray
    import ray.data

    parse_flags(settings.flags)
    connect(settings.replica_cpus, settings.replica_gpus)
    rows = [{"line": r.line, "text": r.text} for r in requests]
    blocks = max(1, -(-len(rows) // BLOCK))
    answers = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
        answerer,
        fn_constructor_kwargs={"flags": list(settings.flags), "cpus": settings.replica_cpus},
        batch_size=BLOCK,
        concurrency=(1, settings.replicas),
        max_concurrency=max(1, settings.at_once // BLOCK),  # deprecated: there is no other way in Ray 2.60
        num_cpus=settings.replica_cpus,
        num_gpus=settings.replica_gpus,
    )
    for row in answers.iter_rows():
        yield int(row["line"]), str(row["answer"])


def connect(cpus: int, gpus: int) -> None:
    """Join the cluster that RAY_ADDRESS names or that this host belongs to, or start one, to run engines on.

    Args:
        cpus, gpus: of an engine.

    Raises:
        UserError: no host has as many, or GPUs would be used without being asked for.
    """
    import ray
    import ray.data

    if not gpus and not is_cpu_build():
        raise UserError("This vLLM computes on GPUs; say with --replica-gpus how many an engine gets.")
    ray.init(
        ignore_reinit_error=True,
        log_to_driver=False,
        logging_level=logging.WARNING,
        runtime_env=environment(),
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    hosts = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(host.get("CPU", 0) >= cpus and host.get("GPU", 0) >= gpus for host in hosts):
        raise UserError(
            f"No host of the cluster has {cpus} cores and {gpus} GPUs for an engine; ask for fewer with --replica-cpus or "
            "--replica-gpus."
        )


def environment(*more: str) -> dict[str, dict[str, str]]:
    """Ray's `runtime_env`: variables that processes on other hosts should have too; `more` are beginnings of their names."""
    # Those of a `ray job` are among them, which Ray takes for a conflict.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    names = ("VLLM_", "CLOVER_", "HF_", "TOKENIZERS_PARALLELISM", *more)
    return {"env_vars": {name: value for name, value in os.environ.items() if name.startswith(names)}}
