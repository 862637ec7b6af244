"""A replica: `ray.serve.llm`'s server, on cores of its own, that leaves as soon as its engine is dead."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from ray.serve.llm import LLMServer

from clover_vllm.cluster.cores import claim_cores
from clover_vllm.launch.environment import is_cpu_build, prepare
from clover_vllm.launch.reaper import start_reaper

logger = logging.getLogger("ray.serve")

BIND = "VLLM_CPU_OMP_THREADS_BIND"

LOOK_EVERY = 0.25
"""Seconds between two looks at the engine."""


class CloverServer(LLMServer):
    """`LLMServer` for vLLM's CPU build and for Clover-2."""

    async def start(self) -> None:
        """Claims cores, starts the engine, and watches it from then on.

        Ray would find a dead engine by its health checks only, and would send it requests until then. An engine whose
        replica is killed ends too; with Ray that takes a setting of `ray start`.
        """
        self._reaper = start_reaper()
        said = (self._llm_config.runtime_env or {}).get("env_vars", {})
        if is_cpu_build() and BIND not in said:  # the environment of `ray start` is that of all replicas
            bundles = self.get_deployment_options(self._llm_config)["placement_group_bundles"]
            cores = int(sum(bundle.get("CPU", 0) for bundle in bundles))
            ranks = int(self._llm_config.engine_kwargs.get("tensor_parallel_size", 1))
            os.environ[BIND] = claim_cores(max(1, cores), ranks)
        prepare()
        await super().start()
        self._watch = asyncio.create_task(self._leave_when_dead())

    async def _leave_when_dead(self) -> None:
        client: Any = self.engine._engine_client
        while not client.errored:
            await asyncio.sleep(LOOK_EVERY)
        logger.error("The engine has died: this replica leaves, and its requests go to others.")
        os._exit(1)
