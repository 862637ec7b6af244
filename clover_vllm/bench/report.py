"""Tables, JSON and plots of `clover-vllm bench`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from clover_vllm.base.errors import UserError
from clover_vllm.base.provenance import environment_settings, write_result
from clover_vllm.bench.loop import Result
from clover_vllm.bench.worker import Run

PARTS = ("verify", "draft", "sample", "move", "python")
"""Parts of a step that Clover's runner times; the rest is vLLM's scheduler and output handling."""

RESAMPLES = 10_000

FEWEST = 5
"""Repetitions from which on a bootstrap interval is called that; before, it is about the range of what was seen."""


class Comparison:
    """Results of one invocation, in relation to the first method.

    Attributes:
        results: at loads where the baseline gave tokens while the clock ran.
        baseline: the first method.
        silent: the other loads.
    """

    def __init__(self, results: Sequence[Result]) -> None:
        """
        Raises:
            UserError: the baseline gave no token at any load.
        """
        self.baseline = results[0].method
        self.silent = [r.concurrency for r in results if r.method == self.baseline and not all(r.rates)]
        self.results = [r for r in results if r.concurrency not in self.silent]
        if not self.results:
            raise UserError(self.left_out())

    def left_out(self) -> str:
        """What to say of the loads that are missing."""
        return (
            f"{self.baseline} gave no token while the clock ran with {' and '.join(map(str, self.silent))} requests at "
            "once, which are left out; raise --num-prompts."
        )

    def of(self, method: str, concurrency: int) -> Result:
        """The result of one method at one concurrency."""
        return next(r for r in self.results if (r.method, r.concurrency) == (method, concurrency))

    def speedups(self, result: Result) -> list[float]:
        """Tokens per second over the baseline's, repetition by repetition."""
        base = self.of(self.baseline, result.concurrency)
        return [own / plain for own, plain in zip(result.rates, base.rates, strict=True)]

    def equal_share(self, result: Result) -> float:
        """Share of requests whose output is the baseline's, token for token."""
        base = self.of(self.baseline, result.concurrency)
        pairs = [
            pair
            for own, plain in zip(result.runs, base.runs, strict=True)
            for pair in zip(own.outputs, plain.outputs, strict=True)
        ]
        return sum(a == b for a, b in pairs) / len(pairs)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary of numbers per method and concurrency."""
        return [self._row(result) for result in self.results]

    def _row(self, result: Result) -> dict[str, Any]:
        rates, ups = result.rates, self.speedups(result)
        return {
            "method": result.method,
            "settings": result.settings,
            "concurrency": result.concurrency,
            "repetitions": len(result.runs),
            "tokens_per_second": statistics.mean(rates),
            "tokens_per_second_interval": bootstrap_interval(rates),
            "speedup": statistics.mean(ups),
            "speedup_interval": bootstrap_interval(ups),
            "tokens_over_answers": tokens_over_answers(result.runs),
            "runs": [
                {"seconds": run.seconds, "tokens": run.tokens, "answered": run.answered, "rate": run.rate}
                for run in result.runs
            ],
            "acceptance_length": acceptance_length(result.runs),
            "acceptance_by_depth": acceptance_by_depth(result.runs),
            "nodes_per_draft": _ratio(
                sum(r.draft_tokens for r in result.runs), sum(r.drafts for r in result.runs)
            ),
            "ms_per_decode_step": decode_step(result.runs),
            **_milliseconds("ttft_ms", [x for r in result.runs for x in r.ttft]),
            **_milliseconds("tpot_ms", [x for r in result.runs for x in r.tpot]),
            **_milliseconds("itl_ms", [x for r in result.runs for x in r.itl]),
            "equal_to_baseline": self.equal_share(result),
            "ms_by_part": split(result.runs),
            "foretold": foretold(result.runs),
        }


def acceptance_length(runs: Sequence[Run]) -> float:
    """1 + accepted / drafts, as vLLM counts; 1 without speculation."""
    return 1 + _ratio(sum(r.accepted for r in runs), sum(r.drafts for r in runs))


def tokens_over_answers(runs: Sequence[Run]) -> float:
    """Tokens while the clock ran over those of the answers that began then: what `Run.rate` evens out."""
    return _ratio(sum(r.tokens for r in runs), sum(r.answered for r in runs))


def acceptance_by_depth(runs: Sequence[Run]) -> list[float]:
    """Share of drafts that had a token accepted at depth 1, 2, ..."""
    drafts = sum(r.drafts for r in runs)
    width = max((len(r.accepted_by_depth) for r in runs), default=0)
    found = [sum(r.accepted_by_depth[d] for r in runs if d < len(r.accepted_by_depth)) for d in range(width)]
    while found and not found[-1]:
        found.pop()
    return [_ratio(count, drafts) for count in found]


def decode_step(runs: Sequence[Run]) -> float:
    """Milliseconds per step that only decodes."""
    return 1e3 * _ratio(sum(r.decode_seconds for r in runs), sum(r.decode_steps for r in runs))


def split(runs: Sequence[Run]) -> dict[str, float]:
    """Milliseconds per decode step by part, empty for methods that are not timed."""
    if not any(r.parts for r in runs):
        return {}
    steps = sum(r.decode_steps for r in runs)
    parts = {name: 1e3 * _ratio(sum(r.parts.get(name, 0.0) for r in runs), steps) for name in PARTS}
    parts["vllm"] = decode_step(runs) - sum(parts.values())
    return parts


def foretold(runs: Sequence[Run]) -> dict[str, float] | None:
    """How far predicted milliseconds of a step were from the observed ones: the median of their ratio, and of its error."""
    ratios = np.array([ratio for r in runs for ratio in r.foretold])
    if not len(ratios):
        return None
    return {"ratio": float(np.median(ratios)), "error": float(np.median(np.abs(ratios - 1.0)))}


def table(comparison: Comparison) -> Table:
    """Speed, tokens per verified draft, latencies and equality, by concurrency and method."""
    title = (
        f"Output tokens per second and speed-up over {comparison.baseline}, with "
        f"{interval_name(len(comparison.results[0].runs))}"
    )
    found = Table(title=title)
    for name in (
        "at once",
        "method",
        "settings",
        "tokens/s",
        "speed-up",
        "tokens/draft",
        "TTFT",
        "TPOT",
        "ITL",
        "equal",
    ):
        left = name in ("method", "settings")
        found.add_column(name, justify="left" if left else "right", no_wrap=True)
    last = None
    for row in comparison.rows():
        if last not in (None, row["concurrency"]):
            found.add_section()
        last = row["concurrency"]
        found.add_row(
            str(row["concurrency"]),
            row["method"],
            row["settings"],
            with_interval(row, "tokens_per_second", 1),
            with_interval(row, "speedup", 2),
            f"{row['acceptance_length']:.2f}",
            *(f"{row[name]:.1f} ms" for name in ("ttft_ms", "tpot_ms", "itl_ms")),
            f"{row['equal_to_baseline']:.0%}",
        )
    return found


def clovers_method(found: dict[str, Any]) -> str | None:
    """The name under which a `bench.json` has Clover-2: its default, else the first with other settings."""
    names = [row["method"] for row in found["results"]]
    return next((name for name in sorted(names, key=len) if name.split("-")[0] == "clover"), None)


def curve(found: dict[str, Any], method: str) -> dict[int, float]:
    """Tokens per second of a method in a `bench.json`, by requests at once."""
    return {
        row["concurrency"]: row["tokens_per_second"] for row in found["results"] if row["method"] == method
    }


def with_interval(row: dict[str, Any], name: str, digits: int) -> str:
    """`1.54 [1.50, 1.57]`"""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def split_table(comparison: Comparison) -> Table:
    """Where a step's time goes, for Clover's methods, in plain steps of the same concurrency too."""
    found = Table(title=f"Milliseconds per decode step (and share of a {comparison.baseline} step)")
    for name in ("at once", "method", *PARTS, "vllm", "step"):
        found.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in comparison.rows():
        if not row["ms_by_part"]:
            continue
        base = comparison._row(comparison.of(comparison.baseline, row["concurrency"]))["ms_per_decode_step"]
        cells = [*row["ms_by_part"].values(), row["ms_per_decode_step"]]
        found.add_row(
            str(row["concurrency"]), row["method"], *(f"{ms:.2f} ({ms / base:.2f})" for ms in cells)
        )
    return found


def write(comparison: Comparison, output: Path, header: dict[str, Any]) -> Path:
    """A JSON file with everything that tables and plots need, and three plots beside it.

    Args:
        comparison: what was measured.
        output: the JSON file (`*.json`), or a folder for `bench.json`.
        header: what was asked for.

    Returns:
        the JSON file.
    """
    rows = comparison.rows()
    file = write_result(
        output,
        "bench.json",
        {
            "environment": environment_settings(),
            **header,
            "baseline": comparison.baseline,
            "results": rows,
        },
    )
    from clover_vllm.bench.plots import plot_lengths, plot_speedups, plot_split

    plot_speedups(file, file.with_name("speedup.png"))
    plot_lengths(rows, file.with_name("tokens-per-draft.png"))
    plot_split(rows, comparison.baseline, file.with_name("time-split.png"))
    return file


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> list[float]:
    """95% percentile bootstrap interval of the mean.

    Of two or three values that is their range, too narrow (see `FEWEST`); of one, that value.

    Returns:
        [low, high].
    """
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def interval_name(repetitions: int) -> str:
    """What `bootstrap_interval` of so many repetitions is called."""
    if repetitions < FEWEST:
        return f"the range of {repetitions} repetition{'s' * (repetitions > 1)}"
    return f"95% bootstrap intervals over {repetitions} repetitions"


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _milliseconds(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """The median under this name, and the 90th percentile."""
    median, high = np.percentile(seconds, [50, 90]).tolist() if seconds else (0.0, 0.0)
    return {name: 1e3 * median, f"{name}_p90": 1e3 * high}
