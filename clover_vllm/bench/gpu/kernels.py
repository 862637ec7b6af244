"""`clover-vllm gpu-check kernels`: are the Triton kernels right on a GPU, and how fast.

It needs PyTorch and Triton; vLLM's own attention is timed where vLLM can be imported. Each case stands alone: what
fails is recorded, and the rest goes on.
"""

from __future__ import annotations

import platform
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import make_folder, write_json
from clover_vllm.base.provenance import provenance
from clover_vllm.base.show import print_table
from clover_vllm.bench.gpu.clock import DEVICE, workers
from clover_vllm.bench.gpu.kernel_checks import (
    FP8,
    GRAPHS,
    KINDS,
    Json,
    Kind,
    check_attention,
    check_graph,
    check_move,
    check_walk,
)
from clover_vllm.bench.gpu.kernel_times import (
    POINTS,
    Limits,
    Point,
    bandwidth,
    time_others,
    time_point,
)


@dataclass(frozen=True)
class Plan:
    """What is checked and timed; `check_kernels` makes it.

    Args:
        kinds: of attention.
        draws: random steps of each.
        graphs: captured and replayed with `draws` other steps.
        trees: requests of the walks.
        points: timed.
        others: (requests, layers, nodes, blocks of a cache) for which walk and move are timed.
        limits: of the device.
    """

    limits: Limits
    kinds: Sequence[Kind] = KINDS
    draws: int = 3
    graphs: Sequence[Kind] = GRAPHS
    trees: int = 200
    points: Sequence[Point] = POINTS
    others: Sequence[tuple[int, int, int, int]] = ((1, 32, 26, 512), (32, 32, 26, 512), (128, 32, 26, 512))


@dataclass
class KernelReport:
    """What comes out, written again after each case that takes time."""

    file: Path
    until: float  # seconds of `time.monotonic`
    about: Json
    results: dict[str, list[Json]] = field(default_factory=dict)

    def left(self, share: float = 0.0) -> bool:
        """Whether there is time for another case, and for a share of all of it behind that."""
        return time.monotonic() < self.until - share * self.about["seconds"]

    def attempt(self, section: str, what: Json, do: Callable[[], Json], share: float = 0.0) -> None:
        """Do a case if time is left, and note what it gives: `ok`, or why it is not."""
        results = self.results.setdefault(section, [])
        if not self.left(share):
            results.append({**what, "ok": None, "why": "no time was left"})
            return
        started = time.monotonic()
        try:
            found = do()
            found = {"ok": True, **found}
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            found = {"ok": False, "why": why[:2000], "trace": traceback.format_exc()[-4000:]}
        results.append({**what, **found, "took": round(time.monotonic() - started, 3)})

    def save(self) -> None:
        write_json(self.file, {**self.about, "results": self.results})

    def ok(self) -> bool:
        """Whether something was done and nothing failed."""
        found = [one["ok"] for results in self.results.values() for one in results]
        return True in found and False not in found


def run(plan: Plan, output: Path, seconds: float) -> bool:
    """Check and time; see `check_kernels`."""
    make_folder(output)
    seed = random.SystemRandom().randrange(1 << 30)
    about = {"provenance": provenance(), "device": _device(), "seed": seed, "seconds": seconds}
    report = KernelReport(output / "gpu-kernels.json", time.monotonic() + seconds, about)
    _check_right(plan, report, seed)
    report.save()
    _print_right(report)
    _time(plan, report, seed)
    report.save()
    _print_times(report)
    Console().print(f"Written to {report.file}.", soft_wrap=True, highlight=False)
    return report.ok()


def _check_right(plan: Plan, report: KernelReport, seed: int) -> None:
    """At most half of the time."""

    def attend(kind: Kind) -> None:
        seeds = range(seed, seed + plan.draws)
        report.attempt("attention", asdict(kind), partial(check_attention, kind, seeds), share=0.5)

    attend(plan.kinds[0])  # alone, since the first launch prepares Triton
    with workers(plan.limits.threads) as pool:
        list(pool.map(attend, plan.kinds[1:]))
    report.save()
    for kind in plan.graphs:
        seeds = range(seed, seed + plan.draws)
        report.attempt("graphs", asdict(kind), partial(check_graph, kind, seeds), share=0.4)
    for nodes in (1, 25, 63):
        what = {"nodes": nodes, "requests": plan.trees}
        report.attempt("walk", what, partial(check_walk, nodes, plan.trees, seed), share=0.4)
    for dtype, cache, layout in (
        ("bfloat16", None, "LBNHC"),
        ("float32", None, "LBHNC"),
        ("bfloat16", FP8, "BLNHC"),
    ):
        kind = Kind(dtype, cache, layout=layout, dim=96, longest=100)
        report.attempt("move", asdict(kind), partial(check_move, kind, seed), share=0.4)


def _time(plan: Plan, report: KernelReport, seed: int) -> None:
    """All that time is left for."""
    per_second: list[float] = []

    def measure() -> Json:
        per_second.append(bandwidth(plan.limits))
        return {"bytes_per_second": per_second[0]}

    report.attempt("bandwidth", {"bytes": plan.limits.copied}, measure)
    if not per_second:
        return
    for requests, layers, nodes, blocks in plan.others:
        what = {"requests": requests}
        report.attempt("others", what, partial(time_others, requests, layers, nodes, blocks))
    for point in plan.points:
        if point.memory(plan.limits) > plan.limits.memory:
            report.results.setdefault("times", []).append(
                {"point": asdict(point), "ok": None, "why": "it does not fit"}
            )
            continue
        report.attempt(
            "times",
            {"point": asdict(point)},
            partial(time_point, point, plan.limits, per_second[0], seed),
        )
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        report.save()


def _device() -> Json:
    found: Json = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if DEVICE.type == "cpu":
        return {**found, "name": "Triton's interpreter"}
    properties = torch.cuda.get_device_properties(DEVICE)
    return {
        **found,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def _print_right(report: KernelReport) -> None:
    table = Table(title=f"Triton kernels on {report.about['device']['name']}")
    for name in ("checked", "right", "wrong", "not done", "largest error", "of its bound"):
        table.add_column(name, justify="left" if name == "checked" else "right")
    for section, results in report.results.items():
        states = [one["ok"] for one in results]
        worst = max(
            (one for one in results if "error" in one), key=lambda x: x["error"] / x["bound"], default=None
        )
        table.add_row(
            section,
            *(str(states.count(state)) for state in (True, False, None)),
            f"{worst['error']:.2g}" if worst else "",
            f"{worst['error'] / worst['bound']:.0%}" if worst else "",
        )
    print_table(table)
    for section, results in report.results.items():
        for one in results:
            if one["ok"] is False:
                Console().print(
                    f"{section}: {one['why'].splitlines()[0][:300]}", soft_wrap=True, markup=False
                )


def _print_times(report: KernelReport) -> None:
    table = Table(title="Microseconds per layer")
    for name in (
        "requests",
        "context",
        "rows",
        "head",
        "floor",
        "ours",
        "splits",
        "best",
        "splits",
        "best tiling",
    ):
        table.add_column(name, justify="right")
    for name in ("FlashAttention", "vLLM"):
        table.add_column(name, justify="right")
    for one in report.results.get("times", []):
        point = one["point"]
        shape = [str(point[name]) for name in ("requests", "context", "rows", "dim")]
        if not one["ok"]:
            table.add_row(*shape, one["why"].splitlines()[0][:60])
            continue
        times = {splits: us for splits, us in one["splits"].items() if isinstance(us, float)}
        best = min(times, key=lambda splits: times[splits], default=None)
        tiling: Json = next(iter(one.get("tilings", [])), {})
        table.add_row(
            *shape,
            _us(one["floor"]),
            _us(one["rule"]),
            str(one["rule_splits"]),
            _us(times.get(best)),
            str(best),
            f"{_us(tiling.get('us'))} {'/'.join(str(tiling[n]) for n in tiling if n != 'us')}"
            if tiling
            else "",
            _us(one["flash"]),
            _us(one["vllm"]),
        )
    print_table(table)
    timed = [one for one in report.results.get("times", []) if one["ok"]]
    for why in {
        one[name] for one in timed for name in ("rule", "flash", "vllm") if isinstance(one[name], str)
    }:
        Console().print(why.splitlines()[0], soft_wrap=True, markup=False, highlight=False)
    for one in report.results.get("others", []):
        if one["ok"]:
            text = (
                f"{one['requests']} requests: walk {_us(one['walk'])}, move {_us(one['move'])} microseconds"
            )
            Console().print(text, highlight=False)


def _us(time: object) -> str:
    return f"{time:.1f}" if isinstance(time, float) else "failed"


def check_kernels(output: Path, quick: bool = False, seconds: float = 150.0) -> bool:
    """Check the kernels against plain PyTorch in float64 on random steps, time them, print tables, and write JSON.

    Args:
        output: folder for gpu-kernels.json.
        quick: a third of the cases, and few times.
        seconds: no case begins after so long.

    Returns:
        Whether nothing failed.

    Raises:
        UserError: there is no GPU, nor Triton's interpreter.
    """
    if DEVICE.type == "cpu":
        raise UserError("This checks kernels on a GPU, and PyTorch finds none.")
    plan = Plan(Limits.of_device())
    if quick:
        plan = replace(plan, kinds=KINDS[:8], draws=1, graphs=GRAPHS[:1], points=POINTS[:3])
    return run(plan, output, seconds)
