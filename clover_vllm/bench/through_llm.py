"""Methods through `LLM`, each engine in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from clover_vllm.bench.loop import Request
from clover_vllm.bench.methods import HINDSIGHT, Method
from clover_vllm.bench.worker import Moment, Run
from clover_vllm.launch.process import JsonProcess


class BenchEngine(JsonProcess):
    """A `bench.worker` process; it sleeps while others run."""

    def __init__(self, method: Method, llm: dict[str, Any]) -> None:
        """
        Args:
            method: how it decodes.
            llm: arguments of vllm.LLM, the same for all methods.

        Raises:
            UserError: the engine does not start.
        """
        # As vLLM sets it for engine cores: else threads of OpenMP wait for more work on the cores of the next engine.
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "KMP_BLOCKTIME": "5"}
        if "VLLM_LOGGING_LEVEL" not in os.environ:
            environment["VLLM_LOGGING_LEVEL"] = "WARNING"
        super().__init__("clover_vllm.bench.worker", method.name, environment)
        self._in_hindsight = method.name == HINDSIGHT
        settings = dict(llm)
        if method.speculative is not None:
            settings["speculative_config"] = method.speculative
        self.ask({"llm": settings})

    def turns(self, requests: Sequence[Request], concurrency: int) -> Iterator[Run | None]:
        """See `worker.run_requests` and `loop.Contender`."""
        asked = {"requests": list(requests), "concurrency": concurrency}
        if self._in_hindsight:  # what its answers are is found out in a turn of its own
            *_, first = self._answers(asked)
            asked = asked | {"known": first["outputs"]}
        for answer in self._answers(asked):
            yield None if "turn" in answer else Run(**answer)

    def _answers(self, command: dict[str, Any]) -> Iterator[dict[str, Any]]:
        answer = self.ask(command)
        while "turn" in answer:
            yield answer
            answer = self.ask({"turn": "yours"})
        yield answer

    def climb(
        self, requests: Sequence[Request], phases: Sequence[int], seconds: float
    ) -> Iterator[list[Moment] | None]:
        """See `worker.run_phases`: None after each turn, what was measured at the end."""
        asked = {"requests": list(requests), "phases": list(phases), "seconds": seconds}
        for answer in self._answers(asked):
            yield None if "turn" in answer else [Moment(**moment) for moment in answer["moments"]]

    def __enter__(self) -> BenchEngine:
        return self
