"""`clover-vllm kernel`: tree attention beside vLLM's own CPU kernel, for the same rows."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from clover_vllm.attention import TreeAttentionInputs, native_kernel, tree_attention
from clover_vllm.attention.cpu.tree_attention import LEVEL_VARIABLE, kernel_levels
from clover_vllm.base.errors import UserError
from clover_vllm.base.progress import each
from clover_vllm.base.provenance import write_result
from clover_vllm.base.show import print_table
from clover_vllm.bench.settings import KernelSettings
from clover_vllm.launch.environment import prepare
from clover_vllm.tree import Tree

BLOCK = 128
ROUNDS = 15
SECONDS = 0.02
"""Each round repeats a call for about this long."""


@dataclass(frozen=True)
class KernelShape:
    """What is attended: SmolLM2-135M's heads and a tree of 8 nodes by default.

    Args:
        heads: of queries.
        kv_heads: of keys and values.
        dim: channels of a head.
        rows: of each request in the step, its root and nodes.
        dtype: bfloat16, float16 or float32.
    """

    heads: int = 9
    kv_heads: int = 3
    dim: int = 64
    rows: int = 9
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Timing:
    """Microseconds per call, median of `ROUNDS`."""

    requests: int
    context: int
    tree: float
    vllm: float


def time_kernels(shape: KernelShape, requests: int, context: int) -> Timing:
    """Time both kernels, alternating, on the same cache."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    dtype = getattr(torch, shape.dtype)
    layout = _get_attn_isa(dtype, BLOCK, shape.dim)
    generator = torch.Generator().manual_seed(0)

    def random_rows(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, shape.dim, generator=generator).to(dtype)

    per_request = -(-(context + shape.rows) // BLOCK)
    pages = torch.zeros(requests * per_request, shape.kv_heads, 2 * BLOCK, shape.dim, dtype=dtype)
    key_cache, value_cache = pages.chunk(2, dim=2)
    table = torch.randperm(requests * per_request, generator=generator).int().view(requests, per_request)
    position = torch.arange(context + shape.rows)
    own = []
    for r in range(requests):
        keys, values = random_rows(len(position), shape.kv_heads), random_rows(len(position), shape.kv_heads)
        slots = table[r, position // BLOCK].long() * BLOCK + position % BLOCK
        ops.cpu_attn_reshape_and_cache(
            keys,
            values,
            key_cache,
            value_cache,
            slots,
            layout,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )
        own.append((keys[context:], values[context:]))
    query = random_rows(requests * shape.rows, shape.heads)
    key, value = (torch.cat(rows) for rows in zip(*own, strict=True))
    starts = torch.arange(requests + 1, dtype=torch.int32) * shape.rows
    prefixes = torch.full((requests,), context, dtype=torch.int32)
    rng = random.Random(0)
    parents = [rng.randrange(-1, node) for node in range(shape.rows - 1)]
    tree = Tree([0] * len(parents), parents)
    inputs = TreeAttentionInputs(
        table,
        starts[:-1].contiguous(),
        starts[1:].contiguous(),
        prefixes,
        torch.tensor(tree.masks * requests),
    )
    scale = shape.dim**-0.5
    lengths = prefixes + shape.rows
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=requests,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        seq_lens=lengths,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=layout,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    output = torch.empty_like(query)

    def ours() -> None:
        tree_attention(query, key, value, key_cache, value_cache, inputs, scale, output, layout)

    def theirs() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0.0,
            scheduler_metadata=metadata,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )

    rounds = [(_time(ours), _time(theirs)) for _ in range(ROUNDS)]
    tree_us, vllm_us = (statistics.median(times) for times in zip(*rounds, strict=True))
    return Timing(requests, context, tree_us, vllm_us)


def _time(call: Callable[[], None]) -> float:
    """Microseconds per call."""
    call()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        call()
        calls += 1
    return (time.perf_counter() - started) / calls * 1e6


def compare_kernels(settings: KernelSettings) -> list[Timing]:
    """Measure, print a table, and write JSON.

    Raises:
        UserError: an unknown dtype, no request or context, the native kernel was not built, or vLLM is not its
            CPU build.
    """
    settings.check()
    prepare()
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or native_kernel() is None:
        raise UserError(
            "This compares kernels of vLLM's CPU build; install that, with a C++ compiler at hand."
        )
    current_platform.import_kernels()
    torch.cpu._init_amx()  # asks the system for matrix tiles, which vLLM's workers do too
    shape = KernelShape(rows=settings.rows, dtype=settings.dtype)
    cases = [(r, c) for r in settings.requests for c in settings.contexts]
    found = [time_kernels(shape, r, c) for r, c in each(cases, "shapes")]
    table = Table(title=f"Microseconds per layer, {shape.rows} rows per request, {shape.dtype}")
    for name in ("requests", "context", "trees", "vLLM, causal", "ratio"):
        table.add_column(name, justify="right")
    for t in found:
        table.add_row(
            str(t.requests), str(t.context), f"{t.tree:.0f}", f"{t.vllm:.0f}", f"{t.tree / t.vllm:.2f}"
        )
    print_table(table)
    if settings.output is not None:
        write_result(
            settings.output,
            "kernel.json",
            {
                "shape": asdict(shape),
                "level": os.environ.get(LEVEL_VARIABLE, kernel_levels()[-1]),
                "threads": torch.get_num_threads(),
                "timings": list(map(asdict, found)),
            },
        )
    return found
