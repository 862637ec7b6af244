"""A replica computes on cores of its own and leaves when its engine is dead."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.llm import LLMConfig, LLMServer

from clover_vllm.cluster import server
from clover_vllm.cluster.server import BIND, CloverServer

pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'LLMServer.__del__'")


def started(monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[list[Any], dict[str, str]]:
    """A replica whose engine dies soon: how it left, and its environment."""
    exits: list[Any] = []
    reapers: list[int] = []
    claims: list[tuple[int, int]] = []

    def claim(count: int, ranks: int) -> str:
        claims.append((count, ranks))
        return "mine"

    async def start(self: LLMServer) -> None:
        assert len(reapers) == 1
        self.engine = SimpleNamespace(_engine_client=client)

    async def run() -> None:
        config = LLMConfig.model_validate(
            {
                "model_loading_config": {"model_id": "m"},
                "accelerator_config": {"kind": "cpu"},
                "placement_group_config": {"bundle_per_worker": {"CPU": 3}},
                "deployment_config": {"ray_actor_options": {"num_cpus": 0}},
                "engine_kwargs": {"tensor_parallel_size": 2},
                **more,
            }
        )
        made = CloverServer.__new__(CloverServer)
        made._llm_config = config
        await made.start()
        await asyncio.sleep(0.05)
        assert not exits
        client.errored = True
        await made._watch

    client = SimpleNamespace(errored=False)
    monkeypatch.setattr(server, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(server, "claim_cores", claim)
    monkeypatch.setattr(server, "start_reaper", lambda: reapers.append(1))
    monkeypatch.setattr(LLMServer, "start", start)
    monkeypatch.setattr(os, "_exit", exits.append)
    asyncio.run(run())
    return exits, {"claims": str(claims), BIND: os.environ.get(BIND, "")}


@pytest.mark.slow
def test_a_replica_leaves_once_its_engine_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the cores of its bundles, whatever `ray start` had in its environment."""
    monkeypatch.setenv(BIND, "of ray start")
    exits, found = started(monkeypatch)
    assert exits == [1]
    assert found == {"claims": "[(6, 2)]", BIND: "mine"}


def test_cores_that_the_file_names_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BIND, "of the file")
    _, found = started(monkeypatch, runtime_env={"env_vars": {BIND: "of the file"}})
    assert found == {"claims": "[]", BIND: "of the file"}
