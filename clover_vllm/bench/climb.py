"""What `clover-vllm climb` does: a load that climbs and falls again, with Clover-2 beside plain vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from clover_vllm.base.progress import Work
from clover_vllm.base.provenance import environment_settings, write_result
from clover_vllm.base.show import print_table
from clover_vllm.bench.compare import (
    engine_settings,
    fitting_prompts,
    prompt_file,
    requests_of,
    span_of,
    split_prompts,
)
from clover_vllm.bench.loop import take_turns
from clover_vllm.bench.methods import select
from clover_vllm.bench.settings import LENGTHS, BenchSettings, ClimbSettings, longest_answer
from clover_vllm.bench.through_llm import BenchEngine
from clover_vllm.bench.worker import TURN, Moment
from clover_vllm.launch.environment import is_cpu_build, prepare
from clover_vllm.target.make import make_target

WINDOW = 5.0
"""Seconds of a window whose speed is compared with plain vLLM's."""


def climb(settings: ClimbSettings) -> None:
    """Measure, print a table, write JSON and a plot.

    Raises:
        UserError: anything that the user can mend.
    """
    settings.check()
    phases = phases_of(settings.highest)
    target = settings.target or str(make_target("smollm2-135m"))
    plain, clover = (grid[0] for grid in select(["clover"], settings.head, None))
    engine = BenchSettings(
        concurrency=[settings.highest], dtype=settings.dtype, max_model_len=settings.max_model_len
    )
    room = settings.max_model_len - longest_answer(settings.max_tokens, LENGTHS[1])
    prompts, _ = split_prompts(fitting_prompts(prompt_file(settings.prompts), 1000, room, target))
    requests = requests_of(prompts, settings.max_tokens, settings.temperature)
    prepare()
    moments: dict[str, list[list[Moment]]] = {plain.name: [], clover.name: []}
    with Work("climbs", 2 * settings.repetitions) as work:
        engines = {}
        for method in (plain, clover):
            work.doing(f"starting {method.name}")
            engines[method.name] = BenchEngine(method, engine_settings(engine, target))
        try:
            for started in engines.values():  # every size is warmed up
                take_turns([started.climb(requests, phases, min(2.0, settings.seconds))])
            for repetition in range(settings.repetitions):
                order = list(engines) if repetition % 2 == 0 else list(engines)[::-1]
                first = repetition * len(requests) // settings.repetitions
                turned = [*requests[first:], *requests[:first]]
                work.doing(" and ".join(order))
                ran = take_turns([engines[name].climb(turned, phases, settings.seconds) for name in order])
                for name, made in zip(order, ran, strict=True):
                    moments[name].append(made)
                work.advance(len(order))
        finally:
            for started in engines.values():
                started.close()
    rows = phase_rows(moments[plain.name], moments[clover.name], phases, settings.seconds)
    windows = window_ratios(moments[plain.name], moments[clover.name], len(phases) * settings.seconds)
    print_table(table(rows, windows))
    if settings.output is None:
        return
    file = write_result(
        settings.output,
        "climb.json",
        {
            "environment": environment_settings(),
            "prompts": prompt_file(settings.prompts).name,
            "temperature": settings.temperature,
            "longest_answers": span_of(requests),
            "repetitions": settings.repetitions,
            "seconds_per_phase": settings.seconds,
            "turn_seconds": TURN if is_cpu_build() else None,
            "phases": rows,
            "windows": windows,
            "by_second": {name: by_second(runs) for name, runs in moments.items()},
        },
    )
    from clover_vllm.bench.plots import plot_climb

    plot_climb(file, file.with_suffix(".png"))
    print(f"Written: {file}, and a plot beside it.")


def phases_of(highest: int) -> list[int]:
    """1, 2, 4, ... up to the highest, and down again."""
    up = [1]
    while up[-1] * 2 <= highest:
        up.append(up[-1] * 2)
    return [*up, *up[-2::-1]]


def rate(moments: Sequence[Moment], begin: float, end: float) -> float:
    """Tokens per second in a stretch of time; those of a step come evenly while it runs."""
    seconds = [0.0, *(m.second for m in moments)]
    known = np.interp([begin, end], seconds, np.cumsum([0, *(m.tokens for m in moments)]))
    return float(known[1] - known[0]) / (end - begin)


def phase_rows(
    plain: Sequence[Sequence[Moment]],
    clover: Sequence[Sequence[Moment]],
    phases: Sequence[int],
    seconds: float,
) -> list[dict[str, Any]]:
    """Speed, nodes and sleep by phase, means over repetitions."""
    rows = []
    for i, running in enumerate(phases):
        begin, end = i * seconds, (i + 1) * seconds
        base, own = (float(np.mean([rate(run, begin, end) for run in runs])) for runs in (plain, clover))
        steps = [m for run in clover for m in run if begin < m.second <= end]
        rows.append(
            {
                "running": running,
                "plain": base,
                "clover": own,
                "ratio": own / base if base else 1.0,
                "nodes_per_step": float(np.mean([m.nodes for m in steps])) if steps else 0.0,
                "asleep": float(np.mean([m.asleep for m in steps])) if steps else 0.0,
            }
        )
    return rows


def window_ratios(
    plain: Sequence[Sequence[Moment]], clover: Sequence[Sequence[Moment]], seconds: float
) -> list[float]:
    """Speed over plain's in every window, mean over repetitions, one window after the other.

    A climb that is shorter than a window is one window.
    """
    ratios = []
    length = min(WINDOW, seconds)
    for i in range(int(seconds / length)):
        begin, end = i * length, (i + 1) * length
        own, base = (np.mean([rate(run, begin, end) for run in runs]) for runs in (clover, plain))
        ratios.append(float(own / base) if base else 1.0)
    return ratios


def by_second(runs: Sequence[Sequence[Moment]]) -> list[dict[str, float]]:
    """Tokens and nodes of every second, and the share of steps asleep, means over repetitions."""
    last = int(max((run[-1].second for run in runs if run), default=0.0))
    found = []
    for second in range(last):
        steps = [m for run in runs for m in run if second < m.second <= second + 1]
        found.append(
            {
                "tokens": float(np.mean([rate(run, second, second + 1) for run in runs])),
                "nodes_per_step": float(np.mean([m.nodes for m in steps])) if steps else 0.0,
                "asleep": float(np.mean([m.asleep for m in steps])) if steps else 0.0,
            }
        )
    return found


def table(rows: Sequence[dict[str, Any]], windows: Sequence[float]) -> Table:
    """Speed by phase."""
    found = Table(
        title=f"A load that climbs and falls; the slowest window of at most {WINDOW:.0f} s is {min(windows):.2f} of plain"
    )
    for name in ("at once", "plain tokens/s", "clover tokens/s", "ratio", "nodes/step", "asleep"):
        found.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        found.add_row(
            str(row["running"]),
            f"{row['plain']:.1f}",
            f"{row['clover']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['nodes_per_step']:.1f}",
            f"{row['asleep']:.0%}",
        )
    return found
