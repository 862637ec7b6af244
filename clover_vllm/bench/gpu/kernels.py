"""`clover-vllm gpu-check kernels`: are the Triton kernels right on a GPU, and how fast.

It needs PyTorch and Triton; vLLM's own attention is timed where vLLM can be imported. Each case stands alone: what
fails is recorded, and the rest goes on.
"""

from __future__ import annotations

import argparse
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

from clover_vllm.attention.triton.cache_rows import CacheRows
from clover_vllm.attention.triton.reference import (
    move_accepted_reference,
    tree_attention_reference,
    walk_trees_reference,
)
from clover_vllm.attention.triton.tree_attention import Partials, tree_attention
from clover_vllm.attention.triton.walk import walk_trees
from clover_vllm.base.errors import UserError
from clover_vllm.base.files import make_folder, write_json
from clover_vllm.base.provenance import provenance
from clover_vllm.base.show import print_table
from clover_vllm.bench.gpu.clock import DEVICE, captured, workers
from clover_vllm.bench.gpu.kernel_times import (
    ALL_POINTS,
    POINTS,
    Json,
    Limits,
    Point,
    bandwidth,
    time_others,
    time_point,
)
from clover_vllm.bench.gpu.paged import (
    Case,
    Request,
    layer_view,
    make_case,
    memory_of,
    memory_shape,
    moved,
    random_tree,
)

BOUNDS = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Of ||found - exact|| / ||exact|| over all rows; over each row and head, four times as much."""


@dataclass(frozen=True)
class Kind:
    """Steps for which Triton compiles one kernel, and perhaps a merge.

    Args:
        dtype: of queries and output.
        cache: dtype of keys and values, if that is another.
        query: dtype of queries, if that is another.
        dim: channels of a head.
        group: query heads per kv head.
        kv_heads: of keys and values.
        page: slots of a block.
        layout: order in memory (see `paged.LAYOUTS`).
        rows: of the largest trees.
        splits: parts of the context.
        window: of sliding-window attention.
        all_rows: whether decodes and prompt chunks are attended too.
        longest: context.
    """

    dtype: str = "bfloat16"
    cache: str | None = None
    query: str | None = None
    dim: int = 128
    group: int = 4
    kv_heads: int = 2
    page: int = 16
    layout: str = "LBNHC"
    rows: int = 27
    splits: int = 1
    window: int = 0
    all_rows: bool = False
    longest: int = 1500


FP8 = "float8_e4m3fn"
KINDS = (
    Kind(splits=4),
    Kind("float16", splits=2, layout="LBHNC", page=32),
    Kind("float32", splits=2, rows=9),
    Kind(cache=FP8, splits=4, page=32),
    Kind(dim=64, group=3, layout="BLNHC", rows=64, splits=8),
    Kind(dim=96, group=1, page=64, window=150, splits=2),
    Kind(dim=256, group=7, splits=16, rows=17, layout="LBHNC"),
    Kind(all_rows=True, splits=16, longest=9000),
    Kind(),
    Kind(all_rows=True, group=8, rows=64, page=32),
    Kind(cache=FP8, query=FP8, dim=64, all_rows=True, splits=2),
    Kind(cache=FP8, dim=256, group=2, layout="BLNHC"),
    Kind(window=64, splits=8, group=8),
    Kind(window=1, rows=9, group=1),
    Kind(dim=64, group=1, kv_heads=8, rows=2, splits=4, all_rows=True),
    Kind(dim=80, group=5, rows=33),
    Kind("float16", dim=64, group=16, kv_heads=1, splits=4),
    Kind("float16", dim=96, group=7, rows=64, layout="BLNHC", all_rows=True),
    Kind("float16", dim=256, group=8, splits=2, window=500),
    Kind("float16", cache=FP8, splits=16),
    Kind("float16", dim=192, group=2, all_rows=True),
    Kind("float32", dim=64, group=3, layout="BLNHC", rows=64, window=150),
    Kind("float32", dim=96, group=8, all_rows=True, splits=8, page=32),
    Kind("float32", dim=256, group=1, rows=17),
)
"""Those first that say most."""
GRAPHS = (Kind(splits=8, all_rows=True), Kind(dim=64, group=3), Kind("float16", splits=2, layout="LBHNC"))


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
class Report:
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


def draw(kind: Kind, seed: int) -> Case:
    """A random step: trees of all sizes, one without context, a decode, a prompt chunk, padding."""
    rng = random.Random(seed)

    def tree(context: int, nodes: int) -> Request:
        return Request(context, nodes + 1, random_tree(rng, nodes))

    chunk = kind.rows if kind.all_rows else 3 * kind.rows
    requests = [
        tree(kind.longest, kind.rows - 1),
        tree(rng.randrange(kind.longest), rng.randrange(kind.rows)),
        tree(rng.randrange(40), rng.randrange(kind.rows)),
        tree(0, kind.rows - 1),
        Request(rng.randrange(1, kind.longest), 1),
        Request(rng.randrange(max(1, kind.longest - chunk)), rng.randrange(1, chunk + 1)),
        Request(0, 0),
    ]
    rng.shuffle(requests)
    case = make_case(
        requests,
        dtype=getattr(torch, kind.dtype),
        cache_dtype=getattr(torch, kind.cache) if kind.cache else None,
        kv_heads=kind.kv_heads,
        group=kind.group,
        dim=kind.dim,
        page=kind.page,
        layout=kind.layout,
        seed=seed,
    )
    table = case.trees.block_table
    table = torch.nn.functional.pad(table, (0, -table.shape[1] % 16))  # Triton compiles by alignment
    query = case.query.to(getattr(torch, kind.query)) if kind.query else case.query
    return replace(case, query=query, trees=replace(case.trees, block_table=table, max_rows=kind.rows))


def options(kind: Kind, device: torch.device) -> Json:
    """Keyword arguments of kernel and reference."""
    scales = {"key_scale": 1.3, "value_scale": 0.6} if kind.cache else {}
    scales |= {"query_scale": 0.7} if kind.query else {}
    return {
        "window": kind.window,
        "all_rows": kind.all_rows,
        **{name: torch.tensor([scale], device=device) for name, scale in scales.items()},
    }


def poisoned(kind: Kind, case: Case) -> Partials | None:
    """Memory for parts, full of NaN."""
    if kind.splits == 1:
        return None
    rows, heads = len(case.requests) * kind.rows, kind.kv_heads * kind.group
    parts = Partials.empty(rows, heads, kind.splits, kind.dim, DEVICE)
    for tensor in (parts.values, parts.maxima, parts.sums):
        tensor.fill_(torch.nan)
    return parts


def compare(kind: Kind, case: Case, found: torch.Tensor) -> Json:
    """With float64.

    Args:
        kind: of the step.
        case: of it, on the CPU.
        found: [T, heads, D], what the kernel left in an output that was NaN.

    Raises:
        AssertionError: it is not near, or rows were written that are not its own.
    """
    exact = tree_attention_reference(
        case.query, case.cache, case.output, case.trees, case.scale, **options(kind, torch.device("cpu"))
    )
    attended = torch.tensor(
        [kind.all_rows or r.tree is not None for r in case.requests for _ in range(r.rows)]
    )
    found = found.cpu().double()
    assert found[~attended].isnan().all(), "rows without a tree were written"
    found, exact = found[attended], exact[attended]
    error = float((found - exact).norm() / exact.norm())
    worst = float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max())
    bound = BOUNDS[kind.dtype]
    assert error <= bound, f"relative error {error:.3g} where {bound:.0e} is allowed (worst row {worst:.3g})"
    assert worst <= 4 * bound, f"relative error of a row {worst:.3g} where {4 * bound:.0e} is allowed"
    return {"error": error, "worst": worst, "bound": bound}


def check_attention(kind: Kind, seeds: Sequence[int]) -> Json:
    """The kernel on random steps; the largest errors."""
    found = []
    for seed in seeds:
        case = draw(kind, seed)
        there = case.on(DEVICE)
        output = torch.full_like(there.output, torch.nan)
        tree_attention(
            there.query,
            there.cache,
            output,
            there.trees,
            case.scale,
            partials=poisoned(kind, case),
            **options(kind, DEVICE),
        )
        found.append(compare(kind, case, output))
    return {name: max(one[name] for one in found) for name in found[0]}


def check_graph(kind: Kind, seeds: Sequence[int]) -> Json:
    """One graph, captured on the first step, and replayed on all with their own lengths, bits, blocks and rows."""
    cases = [draw(kind, seed) for seed in seeds]
    first = cases[0]
    rows, blocks = (max(size) for size in zip(*((len(c.query), len(c.cache)) for c in cases), strict=True))
    heads, dtype = kind.kv_heads * kind.group, first.query.dtype
    shape = memory_shape(kind.layout, blocks, kind.kv_heads, kind.page, 2 * kind.dim)
    query = torch.zeros(rows, heads, kind.dim, dtype=dtype, device=DEVICE)
    cache = layer_view(torch.zeros(shape, dtype=dtype, device=DEVICE), kind.layout)
    output = torch.zeros_like(query)
    trees = first.on(DEVICE).trees
    trees = replace(trees, bits=torch.full((rows + 8,), -1, device=DEVICE))

    def load(case: Case) -> None:
        query[: len(case.query)] = case.query.to(DEVICE)
        cache[: len(case.cache)] = case.cache.to(DEVICE)
        output.fill_(torch.nan)
        trees.block_table.copy_(case.trees.block_table)
        trees.query_start_loc.copy_(case.trees.query_start_loc)
        trees.seq_lens.copy_(case.trees.seq_lens)
        trees.bits[: len(case.trees.bits)] = case.trees.bits.to(DEVICE)

    load(first)
    parts, more = poisoned(kind, first), options(kind, DEVICE)
    replay = captured(
        [lambda: tree_attention(query, cache, output, trees, first.scale, partials=parts, **more)]
    )
    found = []
    for case in [*cases, first]:
        load(case)
        replay()
        found.append(compare(kind, case, output[: len(case.query)]))
    return {name: max(one[name] for one in found) for name in found[0]}


def check_walk(nodes: int, requests: int, seed: int) -> Json:
    """Random trees with siblings that are equal, cut trees, padded ones, requests without a row."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    slots = requests + 5
    tokens = torch.randint(-1, 4, (slots, nodes), generator=generator)
    parents = torch.tensor([random_tree(rng, nodes).parents for _ in range(slots)]).int()
    counts = [rng.choice([nodes + 1, nodes + 1, rng.randrange(1, nodes + 2), 1, 0]) for _ in range(requests)]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    emitted = torch.randint(0, 4, (sum(counts),), generator=generator)
    of_request = torch.tensor(rng.sample(range(slots), requests), dtype=torch.int32)
    given = (emitted, starts, of_request, tokens, parents)
    exact = walk_trees_reference(*given)
    found = walk_trees(*(tensor.to(DEVICE) for tensor in given))
    for name, one, other in zip(("sampled", "num_sampled", "path"), found, exact, strict=True):
        assert torch.equal(one.cpu(), other), f"{name} differs"
    return {"accepted": int(exact[1].clamp(min=1).sum()) - requests}


def check_move(kind: Kind, seed: int) -> Json:
    """Random bits in the caches of three layers; after it every byte is as plain PyTorch would leave it."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    case = draw(kind, seed)
    dtype = getattr(torch, kind.cache or kind.dtype)
    content = 2 * kind.dim * dtype.itemsize
    shape = memory_shape(kind.layout, len(case.cache), kind.kv_heads, kind.page, content)
    layers = [
        layer_view(
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).view(dtype), kind.layout
        )
        for _ in range(3)
    ]
    path = torch.zeros(len(case.requests), kind.rows - 1, dtype=torch.int32)
    num_sampled = torch.ones(len(case.requests), dtype=torch.int32)
    for r, request in enumerate(case.requests):
        if request.tree is not None and request.rows > 1:
            rows = sorted(rng.sample(range(1, request.rows), rng.randrange(1, request.rows)))
            path[r, : len(rows)] = torch.tensor(rows, dtype=torch.int32)
            num_sampled[r] = len(rows) + 1
    given = (case.slots(), case.trees.query_start_loc[:-1].contiguous(), path, num_sampled)
    there = [moved(layer, DEVICE) for layer in layers]
    CacheRows(there).move_accepted(*(tensor.to(DEVICE) for tensor in given))
    move_accepted_reference(layers, *given)
    for layer, found in zip(layers, there, strict=True):
        exact, bits = memory_of(layer).view(torch.uint8), memory_of(found).cpu().view(torch.uint8)
        assert torch.equal(bits, exact), f"{int((bits != exact).sum())} of {exact.numel()} bytes differ"
    return {"moved": int(num_sampled.sum()) - len(num_sampled)}


def run(plan: Plan, output: Path, seconds: float) -> bool:
    """Check and time; see `check_kernels`."""
    make_folder(output)
    seed = random.SystemRandom().randrange(1 << 30)
    about = {"provenance": provenance(), "device": _device(), "seed": seed, "seconds": seconds}
    report = Report(output / "gpu-kernels.json", time.monotonic() + seconds, about)
    _check_right(plan, report, seed)
    report.save()
    _print_right(report)
    _time(plan, report, seed)
    report.save()
    _print_times(report)
    Console().print(f"Written to {report.file}.", soft_wrap=True, highlight=False)
    return report.ok()


def _check_right(plan: Plan, report: Report, seed: int) -> None:
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


def _time(plan: Plan, report: Report, seed: int) -> None:
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


def _print_right(report: Report) -> None:
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


def _print_times(report: Report) -> None:
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
    for one in report.results.get("others", []):
        if one["ok"]:
            text = (
                f"{one['requests']} requests: walk {_us(one['walk'])}, move {_us(one['move'])} microseconds"
            )
            Console().print(text, highlight=False)


def _us(time: object) -> str:
    return f"{time:.1f}" if isinstance(time, float) else "failed"


def check_kernels(output: Path, quick: bool = False, seconds: float = 150.0, full: bool = False) -> bool:
    """Check the kernels against plain PyTorch in float64 on random steps, time them, print tables, and write JSON.

    Args:
        output: folder for gpu-kernels.json.
        quick: a third of the cases, and few times.
        seconds: no case begins after so long.
        full: all points are timed.

    Returns:
        Whether nothing failed.

    Raises:
        UserError: there is no GPU, nor Triton's interpreter.
    """
    if DEVICE.type == "cpu":
        raise UserError("This checks kernels on a GPU, and PyTorch finds none.")
    plan = Plan(Limits.of_device(), points=ALL_POINTS if full else POINTS)
    if quick:
        plan = replace(plan, kinds=KINDS[:8], draws=1, graphs=GRAPHS[:1], points=POINTS[:3])
    return run(plan, output, seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for gpu-kernels.json")
    parser.add_argument("--quick", action="store_true", help="a third of the cases")
    parser.add_argument("--seconds", type=float, default=150.0, help="no case begins after so long")
    parser.add_argument("--full", action="store_true", help="time all points")
    given = parser.parse_args(arguments)
    return 0 if check_kernels(given.output, given.quick, given.seconds, given.full) else 1


if __name__ == "__main__":
    raise SystemExit(main())
