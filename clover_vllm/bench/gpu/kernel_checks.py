"""Are the Triton kernels right: random steps against plain PyTorch, attention in float64, the rest bit by bit.

The references run on the CPU, so that nothing but the kernels depends on the device.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clover_vllm.attention.triton.cache_rows import CacheRows
from clover_vllm.attention.triton.reference import (
    move_accepted_reference,
    tree_attention_reference,
    walk_trees_reference,
)
from clover_vllm.attention.triton.tree_attention import Partials, tree_attention
from clover_vllm.attention.triton.walk import walk_trees
from clover_vllm.bench.gpu.clock import DEVICE, captured
from clover_vllm.bench.gpu.paged import (
    PagedCase,
    PagedRequest,
    layer_view,
    make_case,
    memory_of,
    memory_shape,
    moved,
    random_tree,
)

Json = dict[str, Any]

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


def draw(kind: Kind, seed: int) -> PagedCase:
    """A random step: trees of all sizes, one without context, a decode, a prompt chunk, padding."""
    rng = random.Random(seed)

    def tree(context: int, nodes: int) -> PagedRequest:
        return PagedRequest(context, nodes + 1, random_tree(rng, nodes))

    chunk = kind.rows if kind.all_rows else 3 * kind.rows
    requests = [
        tree(kind.longest, kind.rows - 1),
        tree(rng.randrange(kind.longest), rng.randrange(kind.rows)),
        tree(rng.randrange(40), rng.randrange(kind.rows)),
        tree(0, kind.rows - 1),
        PagedRequest(rng.randrange(1, kind.longest), 1),
        PagedRequest(rng.randrange(max(1, kind.longest - chunk)), rng.randrange(1, chunk + 1)),
        PagedRequest(0, 0),
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


def poisoned(kind: Kind, case: PagedCase) -> Partials | None:
    """Memory for parts, full of NaN."""
    if kind.splits == 1:
        return None
    rows, heads = len(case.requests) * kind.rows, kind.kv_heads * kind.group
    parts = Partials.empty(rows, heads, kind.splits, kind.dim, DEVICE)
    for tensor in (parts.values, parts.maxima, parts.sums):
        tensor.fill_(torch.nan)
    return parts


def errors_of(kind: Kind, case: PagedCase, found: torch.Tensor) -> Json:
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
        found.append(errors_of(kind, case, output))
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

    def load(case: PagedCase) -> None:
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
        found.append(errors_of(kind, case, output[: len(case.query)]))
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
