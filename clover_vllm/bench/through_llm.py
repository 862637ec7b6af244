"""Runs of several methods through `LLM`, in alternating order, each engine in its own process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from rich.progress import Progress

from clover_vllm.bench.methods import Method
from clover_vllm.bench.worker import Run
from clover_vllm.launch.environment import prepare
from clover_vllm.launch.process import JsonProcess


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    methods: list[Method]  # the first is what the others are compared with
    llm: dict[str, Any]  # arguments of vllm.LLM, the same for all
    portions: list[list[dict[str, Any]]]
    """Requests of each run, repetitions of the first concurrency first; a request is {"prompt": token ids,
    "params": SamplingParams arguments}."""
    warm_up: list[dict[str, Any]]  # requests that are not measured
    concurrencies: list[int]
    repetitions: int


@dataclass
class Result:
    """All repetitions of one method at one concurrency, in order."""

    method: str
    concurrency: int
    runs: list[Run] = field(default_factory=list)


class Engine(JsonProcess):
    """A `bench.worker` process; it sleeps while others run."""

    def __init__(self, method: Method, llm: dict[str, Any]) -> None:
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if "VLLM_LOGGING_LEVEL" not in os.environ:
            environment["VLLM_LOGGING_LEVEL"] = "WARNING"
        super().__init__("clover_vllm.bench.worker", method.name, environment)
        settings = dict(llm)
        if method.speculative is not None:
            settings["speculative_config"] = method.speculative
        self.ask({"llm": settings})

    def run(self, requests: Sequence[dict[str, Any]], concurrency: int) -> Run:
        return Run(**self.ask({"requests": list(requests), "concurrency": concurrency}))


def measure(plan: Plan, progress: Progress) -> list[Result]:
    """Start one engine per method, then run them in turn, forwards and backwards.

    Raises:
        UserError: an engine ended.
    """
    prepare()
    total = len(plan.methods) * (1 + len(plan.concurrencies) * plan.repetitions)
    task = progress.add_task("", total=total)
    results = {(m.name, c): Result(m.name, c) for c in plan.concurrencies for m in plan.methods}
    with ExitStack() as stack:
        engines = []
        for method in plan.methods:
            progress.update(task, description=f"starting {method.name}")
            engine = Engine(method, plan.llm)
            stack.callback(engine.close)
            engine.run(plan.warm_up, max(plan.concurrencies))
            engines.append(engine)
            progress.advance(task)
        portions = iter(plan.portions)
        for concurrency in plan.concurrencies:
            for order in orders(len(engines), plan.repetitions):
                requests = next(portions)
                for i in order:
                    name = engines[i].name
                    progress.update(task, description=f"{name}, concurrency {concurrency}")
                    run = engines[i].run(requests, concurrency)
                    results[name, concurrency].runs.append(run)
                    progress.advance(task)
    return list(results.values())


def orders(count: int, repetitions: int) -> Iterator[list[int]]:
    """Forwards, backwards, forwards: drift of the machine hits no method alone."""
    for repetition in range(repetitions):
        order = list(range(count))
        yield order[::-1] if repetition % 2 else order
