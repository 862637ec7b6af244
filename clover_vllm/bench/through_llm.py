"""Methods through `LLM`, each engine in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
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
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
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
        run = yield from self._turns(asked)
        if self._in_hindsight:
            run = yield from self._turns(asked | {"known": run.outputs})
        yield run

    def _turns(self, command: dict[str, Any]) -> Generator[None, None, Run]:
        answer = self.ask(command)
        while "turn" in answer:
            yield
            answer = self.ask({"turn": "yours"})
        return Run(**answer)

    def climb(self, requests: Sequence[Request], phases: Sequence[int], seconds: float) -> list[Moment]:
        """See `worker.run_phases`."""
        found = self.ask({"requests": list(requests), "phases": list(phases), "seconds": seconds})
        return [Moment(**moment) for moment in found["moments"]]

    def __enter__(self) -> BenchEngine:
        return self
