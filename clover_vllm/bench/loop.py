"""The order of a benchmark: which method runs when, and on which requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from clover_vllm.base.progress import Work
from clover_vllm.bench.methods import Method
from clover_vllm.bench.worker import Run

T = TypeVar("T")

Request = dict[str, Any]
"""{"prompt": token ids, "params": SamplingParams arguments}."""


class Contender(Protocol):
    """An engine or server with one method; it uses no processor time but in its turns."""

    def turns(self, requests: Sequence[Request], concurrency: int) -> Iterator[Run | None]:
        """Answer the requests: None after each turn, the measurement at the end."""
        ...


Start = Callable[[Method], AbstractContextManager[Contender]]
"""Starts a method's engine or server; its context ends it."""


@dataclass(frozen=True)
class Load:
    """What is measured at one concurrency."""

    concurrency: int
    warm_up: list[Request]  # not measured; as many at a time as are measured
    runs: list[list[Request]]  # one list per repetition


@dataclass
class Result:
    """All repetitions of one method at one concurrency, in order."""

    method: str
    concurrency: int
    runs: list[Run] = field(default_factory=list)
    settings: str = ""  # of the method, in words

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [run.rate for run in self.runs]


def run_loads(
    start: Start, loads: Sequence[Load], methods: Callable[[int], Sequence[Method]], work: Work
) -> list[Result]:
    """Run methods on the same requests, in turns, forwards and backwards.

    Args:
        start: makes engines or servers. Those that the next concurrency uses stay.
        loads: one per concurrency.
        methods: by concurrency; the first is what the others are compared with.
        work: advanced by every warm-up and every run.

    Raises:
        UserError: an engine ended.
    """
    results = []
    with ExitStack() as all_started:
        started: dict[Method, tuple[Contender, ExitStack]] = {}
        for load in loads:
            chosen = list(methods(load.concurrency))
            for method in [m for m in started if m not in chosen]:
                started.pop(method)[1].close()
            for method in chosen:
                if method not in started:
                    work.doing(f"starting {method.name}")
                    stack = all_started.enter_context(ExitStack())
                    started[method] = (stack.enter_context(start(method)), stack)
                work.doing(f"warming up {method.name} at {load.concurrency}")
                take_turns([started[method][0].turns(load.warm_up, load.concurrency)])
                work.advance()
            found = [Result(m.name, load.concurrency, settings=m.settings) for m in chosen]
            for order, requests in zip(orders(len(chosen), len(load.runs)), load.runs, strict=True):
                work.doing(f"{', '.join(m.name for m in chosen)} at {load.concurrency}")
                ran = take_turns([started[chosen[i]][0].turns(requests, load.concurrency) for i in order])
                for i, run in zip(order, ran, strict=True):
                    found[i].runs.append(run)
                work.advance(len(order))
            results += found
    return results


def take_turns(contenders: Sequence[Iterator[T | None]]) -> list[T]:
    """What each has measured, once all have."""
    found: dict[int, T] = {}
    while len(found) < len(contenders):
        for i, turns in enumerate(contenders):
            if i not in found and (measured := next(turns)) is not None:
                found[i] = measured
    return [found[i] for i in range(len(contenders))]


def count_runs(loads: Sequence[Load], methods: Callable[[int], Sequence[Method]]) -> int:
    """How far `run_loads` advances."""
    return sum(len(methods(load.concurrency)) * (1 + len(load.runs)) for load in loads)


def sweep(
    start: Start, loads: Sequence[Load], grids: Sequence[Sequence[Method]], work: Work
) -> dict[int, list[Method]]:
    """The fastest settings of each method at each concurrency.

    One engine runs at a time. A method without a choice is not run.

    Args:
        start: makes engines or servers.
        loads: of the development split.
        grids: each method's possible settings.
        work: advanced by every warm-up and every run.

    Returns:
        by concurrency, one method per grid, in their order.
    """
    best: dict[int, list[Method]] = {load.concurrency: [] for load in loads}
    for grid in grids:
        fastest = dict.fromkeys(best, (-1.0, grid[0]))
        for method in grid if len(grid) > 1 else []:
            for result in run_loads(start, loads, lambda _, method=method: [method], work):  # type: ignore[misc]
                rate = sum(result.rates) / len(result.rates)
                fastest[result.concurrency] = max(
                    fastest[result.concurrency], (rate, method), key=lambda pair: pair[0]
                )
        for concurrency, (_, method) in fastest.items():
            best[concurrency].append(method)
    return best


def orders(count: int, repetitions: int) -> Iterator[list[int]]:
    """Forwards, backwards, forwards: what comes first gains nothing by it."""
    for repetition in range(repetitions):
        order = list(range(count))
        yield order[::-1] if repetition % 2 else order
