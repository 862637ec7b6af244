"""Actors of batches without vLLM, for tests of what is around them: quick to start, and they die when told."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from clover_vllm.cluster.answering import EngineDied
from clover_vllm.cluster.through_ray import Answerer
from clover_vllm.launch.reaper import LOOK_EVERY


class StandInAnswering:
    """Stands for `cluster.answering.Answering`; dies at a line that says so, once. Its child stands for an engine core."""

    def __init__(self, flags: list[str]) -> None:
        self._folder = Path(flags[-1])
        child = subprocess.Popen(["sleep", "1000"])
        (self._folder / f"{child.pid}.child").touch()

    async def answer(self, text: str) -> str:
        await asyncio.sleep(0.01)
        line = json.loads(text)
        fatal = self._folder / line["custom_id"]
        if line["custom_id"].startswith(("fatal", "kill")) and not fatal.exists():
            fatal.touch()
            if line["custom_id"].startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise EngineDied
        with (self._folder / "asked").open("a") as file:
            file.write(line["custom_id"] + "\n")
        return json.dumps({"custom_id": line["custom_id"], "error": None})


class StandInAnswerer(Answerer):
    """`Answerer` on a stand-in."""

    def __init__(self, flags: list[str], cpus: int) -> None:
        del cpus
        super()._prepare(flags)

    @staticmethod
    @asynccontextmanager
    async def _start(flags: Any) -> AsyncIterator[Any]:
        made = StandInAnswering(list(flags))
        await asyncio.sleep(2 * LOOK_EVERY + 4)  # an engine takes longer to load
        yield made
