"""Replicas without vLLM, for tests of what is around them: quick to start, and they die when told."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray.serve.llm.openai_api_models import ChatCompletionResponse

from clover_vllm.base.files import whole_file
from clover_vllm.cluster.server import CloverServer

SECONDS = 2.0
"""That an answer takes."""


def answer_to(content: str) -> str:
    """What every stand-in says."""
    return f"answer to {content}"


class StandInEngine:
    """Stands for Ray's VLLMEngine; its child stands for an engine core."""

    def __init__(self, config: Any) -> None:
        self._head = config.engine_kwargs["speculative_config"]["model"]
        self._folder = Path(os.environ["STAND_IN_FOLDER"])
        self._engine_client = self
        self.errored = False

    async def start(self) -> None:
        child = subprocess.Popen(["sleep", "1000"])
        note = {"child": child.pid, "head": self._head, "cores": os.environ["VLLM_CPU_OMP_THREADS_BIND"]}
        with whole_file(self._folder / f"{os.getpid()}.json") as fresh:
            fresh.write_text(json.dumps(note))

    async def check_health(self) -> None:
        assert not self.errored

    async def chat(self, request: Any, info: Any = None) -> AsyncIterator[Any]:
        """Three pieces; which kinds of requests have begun is noted."""
        content = request.messages[0]["content"]
        for piece in range(3):
            await asyncio.sleep(SECONDS / 3)
            if (self._folder / f"die-{os.getpid()}").exists():
                self.errored = True
                raise RuntimeError("EngineDeadError: told to die")
            if request.stream:
                event = {"choices": [{"index": 0, "delta": {"content": f"{piece} {answer_to(content)}"}}]}
                yield f"data: {json.dumps(event)}\n\n"
            with (self._folder / f"begun-{os.getpid()}").open("a") as file:
                file.write(f"{content}\n")
        if not request.stream:
            message = {"role": "assistant", "content": answer_to(content)}
            yield ChatCompletionResponse.model_validate(
                {
                    "model": "small",
                    "choices": [{"index": 0, "message": message}],
                    "usage": {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1},
                }
            )


class StandInServer(CloverServer):
    """`CloverServer` on a stand-in."""

    _default_engine_cls = StandInEngine
