"""How long the Triton kernels take, beside the least that memory allows and beside other attention.

What they read lies in several caches that take turns, together larger than the L2 cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from clover_vllm.attention.triton.cache_rows import CacheRows
from clover_vllm.attention.triton.inputs import CAUSAL, PagedTrees
from clover_vllm.attention.triton.tree_attention import Partials, Tiling, processors_of, tree_attention
from clover_vllm.attention.triton.walk import walk_trees
from clover_vllm.bench.gpu.clock import DEVICE, microseconds, workers
from clover_vllm.bench.gpu.paged import random_tree

Json = dict[str, Any]

PAGE = 16
SPLITS = (1, 2, 4, 8, 16)
TILINGS = (
    Tiling(128, tile=32, warps=8, stages=3),
    Tiling(128, tile=32, warps=4, stages=3),
    Tiling(128, tile=32, warps=8, stages=5),
    Tiling(128, tile=64, warps=8, stages=2),
    Tiling(128, tile=64, warps=8, stages=3),
    Tiling(128, tile=128, warps=8, stages=2),
    Tiling(64, tile=32, warps=4, stages=3),
    Tiling(64, tile=32, warps=4, stages=5),
    Tiling(64, tile=64, warps=4, stages=3),
    Tiling(64, tile=128, warps=4, stages=2),
)
"""Tried at the points that are tuned."""


@dataclass(frozen=True)
class Limits:
    """Of a device, or smaller ones for tests.

    Args:
        memory: bytes that a point may take.
        cache: bytes of the L2 cache.
        copied: bytes that are copied to measure the memory's bandwidth.
        threads: that compile.
    """

    memory: int
    cache: int
    copied: int
    threads: int

    @classmethod
    def of_device(cls) -> Limits:
        properties = torch.cuda.get_device_properties(DEVICE)
        free, _ = torch.cuda.mem_get_info()
        return cls(min(60 << 30, free * 3 // 4), properties.L2_cache_size, 1 << 30, threads=8)


@dataclass(frozen=True)
class Point:
    """A step of decoding requests, in bfloat16: by default of an 8B model and trees of 26 nodes."""

    requests: int
    context: int
    rows: int = 27
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    tuned: bool = False

    @property
    def size(self) -> int:
        """Bytes of the keys and values of a layer."""
        return self.requests * (self.context + self.rows) * self.kv_heads * 2 * self.dim * 2

    def caches(self, limits: Limits) -> int:
        """How many take turns."""
        return min(64, max(1, -(-2 * limits.cache // self.size)))

    def memory(self, limits: Limits) -> int:
        """Bytes: paged and dense keys and values, and what 16 parts leave."""
        parts = self.requests * self.rows * self.heads * max(SPLITS) * (self.dim + 2) * 4
        return 2 * self.caches(limits) * self.size + parts


POINTS = (
    Point(1, 512),
    Point(1, 4096, tuned=True),
    Point(8, 4096, tuned=True),
    Point(32, 4096, tuned=True),
    Point(1, 32768, tuned=True),
    Point(8, 4096, heads=32, dim=64, tuned=True),
    Point(8, 32768),
    Point(8, 512),
    Point(32, 512),
    Point(128, 512, tuned=True),
    Point(128, 4096),
    Point(1, 4096, rows=9),
    Point(8, 4096, rows=17),
    Point(8, 4096, rows=64),
    Point(1, 4096, heads=32, dim=64),
)
"""Those first that say most."""


class TimedStep:
    """Random numbers for a point."""

    def __init__(self, point: Point, limits: Limits, seed: int) -> None:
        self.point = point
        torch.manual_seed(seed)
        rng = random.Random(seed)
        count, length = point.caches(limits), point.context + point.rows
        blocks = -(-length // PAGE)
        shape = (count * point.requests * blocks, PAGE, point.kv_heads, 2 * point.dim)
        self.cache = _noise(*shape).transpose(1, 2)
        order = torch.randperm(shape[0], device=DEVICE).int().view(count, point.requests, blocks)
        self.tables = torch.nn.functional.pad(order, (0, -blocks % 16))  # of one alignment for all contexts
        self.starts = torch.arange(point.requests + 1, dtype=torch.int32, device=DEVICE) * point.rows
        self.lengths = torch.full((point.requests,), length, dtype=torch.int32, device=DEVICE)
        masks = [
            mask for _ in range(point.requests) for mask in random_tree(rng, point.rows - 1).masks
        ]  # per row
        self.bits = torch.tensor(masks, device=DEVICE)
        self.query = _noise(point.requests * point.rows, point.heads, point.dim)
        self.output = torch.empty_like(self.query)
        self.scale = point.dim**-0.5

    def ours(
        self, splits: int, tiling: Tiling | None = None, *, causal: bool = False
    ) -> list[Callable[[], None]]:
        """Tree attention, or with plain rows."""
        point = self.point
        rows = point.requests * point.rows
        bits = torch.full_like(self.bits, CAUSAL) if causal else self.bits
        parts = Partials.empty(rows, point.heads, splits, point.dim, DEVICE) if splits > 1 else None
        return [
            partial(
                tree_attention,
                self.query,
                self.cache,
                self.output,
                PagedTrees(table, self.starts, self.lengths, bits, point.rows),
                self.scale,
                all_rows=True,
                partials=parts,
                tiling=tiling,
            )
            for table in self.tables
        ]

    def vllm(self) -> list[Callable[[], None]]:
        """vLLM's Triton attention over the same cache, of plain rows."""
        point, attend = self.point, _load_vllm()
        if isinstance(attend, str):
            raise ImportError(attend)
        keys, values = self.cache.transpose(1, 2).split(point.dim, dim=-1)
        return [
            partial(
                attend,
                q=self.query,
                k=keys,
                v=values,
                out=self.output,
                cu_seqlens_q=self.starts,
                max_seqlen_q=point.rows,
                seqused_k=self.lengths,
                max_seqlen_k=point.context + point.rows,
                softmax_scale=self.scale,
                causal=True,
                window_size=(-1, -1),
                block_table=table,
                softcap=0,
                q_descale=None,
                k_descale=None,
                v_descale=None,
            )
            for table in self.tables
        ]

    def flash(self) -> list[Callable[[], object]]:
        """PyTorch's FlashAttention of these rows over as many keys and values that lie together, without a mask."""
        point = self.point
        length = point.context + point.rows
        shape = (len(self.tables), 2, point.requests, point.kv_heads, length, point.dim)
        query = self.query.view(point.requests, point.rows, point.heads, point.dim).transpose(1, 2)

        def attend(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        return [partial(attend, *both) for both in _noise(*shape)]


def _noise(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()


@cache
def _load_vllm() -> Any:
    """vLLM's Triton attention, or why there is none: looked for once."""
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except Exception as error:
        return f"vLLM cannot be imported ({type(error).__name__}: {error})."
    return unified_attention


def bandwidth(limits: Limits) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.zeros(limits.copied, dtype=torch.uint8, device=DEVICE)
    return 2 * limits.copied / microseconds([partial(torch.empty_like(source).copy_, source)]) * 1e6


def compile_first(variants: Iterable[Sequence[Callable[[], object]]], threads: int) -> None:
    """Call each once, in threads, since Triton compiles outside of Python's lock. Who fails will fail again."""

    def call(variant: Sequence[Callable[[], object]]) -> None:
        with suppress(Exception):
            variant[0]()

    with workers(threads) as pool:
        list(pool.map(call, variants))


def time_point(point: Point, limits: Limits, per_second: float, seed: int) -> Json:
    """Everything about a point.

    Args:
        point: what is timed.
        limits: of the device.
        per_second: bytes that the memory moves.
        seed: of the numbers.

    Returns:
        microseconds: `floor`, the keys and values read once; `splits`, ours by parts of the context; `tilings`;
        `flash`; `vllm`; `rule`, ours as the engine would launch it. What failed is a sentence instead.
    """
    step = TimedStep(point, limits, seed)
    group = point.heads // point.kv_heads
    tiling = Tiling.of(point.rows, group, point.dim, 2)
    chosen = tiling.splits(
        point.requests, point.rows, group, point.kv_heads, point.dim, processors_of(DEVICE)
    )
    by_splits = {splits: step.ours(splits) for splits in SPLITS}
    compile_first(by_splits.values(), limits.threads)
    times = {splits: _attempt(partial(microseconds, calls)) for splits, calls in by_splits.items()}
    found: Json = {
        "point": asdict(point),
        "caches": len(step.tables),
        "floor": point.size / per_second * 1e6,
        "tiling": asdict(tiling),
        "rule_splits": chosen,
        "rule": times[chosen],
        "splits": times,
        "vllm": _attempt(lambda: microseconds(step.vllm())),
        "vllm_differs": _attempt(lambda: _difference(step)),
        "flash": _attempt(lambda: microseconds(step.flash())),
    }
    if point.tuned:
        best = min(SPLITS, key=lambda splits: _number(times[splits]))
        found["tilings"] = _tune(step, best, limits)
    return found


def _tune(step: TimedStep, splits: int, limits: Limits) -> list[Json]:
    """Other tilings, with the number of parts that is best for the usual one and with twice that."""
    variants = [
        (parts, tiling, step.ours(parts, tiling))
        for tiling in TILINGS
        for parts in sorted({splits, min(2 * splits, max(SPLITS))})
    ]
    compile_first([calls for _, _, calls in variants], limits.threads)
    found: list[Json] = [
        {**asdict(tiling), "splits": parts, "us": _attempt(partial(microseconds, calls))}
        for parts, tiling, calls in variants
    ]
    return sorted(found, key=lambda one: _number(one["us"]))


def _number(time: float | str) -> float:
    return time if isinstance(time, float) else float("inf")


def _attempt(measure: Callable[[], float]) -> float | str:
    """A number, or why there is none."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]


def _difference(step: TimedStep) -> float:
    """Between ours and vLLM's for plain rows, relative."""
    step.vllm()[0]()
    theirs = step.output.float()
    step.ours(1, causal=True)[0]()
    return float((step.output.float() - theirs).norm() / theirs.norm())


def time_others(requests: int, layers: int, nodes: int, blocks: int) -> Json:
    """The walk, and moving 3 accepted rows in the caches of all layers, of 8 kv heads of size 128.

    Args:
        requests: that verify trees.
        layers: of the target.
        nodes: of each tree.
        blocks: of each cache.
    """
    rows = requests * (nodes + 1)
    starts = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE) * (nodes + 1)
    tokens = torch.randint(0, 3, (requests, nodes), device=DEVICE)
    parents = torch.tensor([random_tree(random.Random(0), nodes).parents] * requests, device=DEVICE).int()
    emitted = torch.randint(0, 3, (rows,), device=DEVICE)
    slots_of = torch.arange(requests, dtype=torch.int32, device=DEVICE)
    walk = partial(walk_trees, emitted, starts, slots_of, tokens, parents)
    caches = [_noise(blocks, PAGE, 8, 256).transpose(1, 2) for _ in range(layers)]
    slots = torch.randperm(blocks * PAGE, device=DEVICE)[:rows]
    path = torch.zeros(requests, nodes, dtype=torch.int32, device=DEVICE)
    path[:, :3] = torch.tensor([2, 4, 5], device=DEVICE)
    move = partial(CacheRows(caches).move_accepted, slots, starts[:-1], path, torch.full_like(starts[1:], 4))
    return {
        "requests": requests,
        "layers": layers,
        "nodes": nodes,
        "walk": microseconds([walk]),
        "move": microseconds([move]),
    }
