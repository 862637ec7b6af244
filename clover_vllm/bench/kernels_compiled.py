"""`clover-vllm kernels-compiled`: the Triton kernels compiled for GPUs that need not be there.

The launchers run on small CPU tensors with a driver that compiles for a GPU, notes what the machine code needs, and
launches nothing. So what is compiled is what would be launched. It shows errors of types and registers that spill,
nothing of speed.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from clover_vllm.base.errors import UserError
from clover_vllm.base.progress import each
from clover_vllm.base.provenance import write_result
from clover_vllm.base.show import print_table
from clover_vllm.bench.settings import KernelsCompiledSettings

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes that a thread block can have, by compute capability (CUDA C++ Programming Guide, "Technical Specifications")."""


@dataclass(frozen=True)
class CompiledShape:
    """What is attended.

    Args:
        dim: channels of a head.
        group: query heads per kv head.
        rows: of each request, its root and nodes.
        dtype: of queries and output.
        cache: dtype of keys and values, if that is another.
        splits: parts of the context.
        window: of sliding-window attention.
    """

    dim: int = 128
    group: int = 4
    rows: int = 26
    dtype: str = "bfloat16"
    cache: str | None = None
    splits: int = 1
    window: int = 0

    def is_known(self, capability: int) -> bool:
        """Whether Triton compiles it for a GPU: vLLM's fp8 type needs compute capability 8.9."""
        return self.cache is None or capability >= 89

    def __str__(self) -> str:
        parts = [f"head size {self.dim}", f"{self.rows} rows of {self.group} heads", self.dtype]
        parts += [f"{self.cache} cache"] if self.cache else []
        parts += [f"{self.splits} splits"] if self.splits > 1 else []
        parts += [f"window {self.window}"] if self.window else []
        return ", ".join(parts)


SHAPES = (
    *(CompiledShape(dim) for dim in (64, 80, 96, 128, 192, 256)),
    CompiledShape(group=1),
    CompiledShape(group=8, rows=64),
    CompiledShape(splits=8),
    CompiledShape(window=1024),
    CompiledShape(dtype="float16"),
    CompiledShape(dtype="float32"),
    CompiledShape(cache="float8_e4m3fn"),
)


@dataclass(frozen=True)
class Compiled:
    """What a kernel's machine code needs."""

    kernel: str
    shape: str
    capability: int
    registers: int  # per thread
    spilled: int  # bytes per thread that did not fit into registers
    shared: int  # bytes per thread block
    warps: int


_DEVICES = itertools.count()
"""Triton keeps what it compiled by device, and would not load it again."""


class _NoDevice:
    """Stands where Triton has the driver of a GPU (`triton.backends.driver.DriverBase`)."""

    def __init__(self, capability: int, shape: str) -> None:
        self._capability, self._shape = capability, shape
        self.found: list[Compiled] = []
        self.utils = self
        self._device = next(_DEVICES)

    def launcher_cls(self, _: Any, metadata: Any) -> Callable[..., None]:
        self._warps = metadata.num_warps
        return lambda *_: None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self._capability]}

    def load_binary(self, name: str, cubin: bytes, shared: int, _: int) -> tuple[None, None, int, int, int]:
        registers, spilled = resources(cubin)
        self.found.append(
            Compiled(name.strip("_"), self._shape, self._capability, registers, spilled, shared, self._warps)
        )
        return None, None, registers, spilled, 1024


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes per thread on the stack, which Triton's kernels only use to spill."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(tool, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    assert usage is not None, said
    return int(usage[1]), int(usage[2]) + int(usage[3])


@contextmanager
def _compiling(capability: int, shape: str) -> Iterator[_NoDevice]:
    from triton.runtime.driver import driver

    stand_in = _NoDevice(capability, shape)
    before = driver._active
    driver.set_active(stand_in)
    try:
        yield stand_in
    finally:
        driver._active = before


def compile_attention(shape: CompiledShape, capability: int) -> list[Compiled]:
    """Tree attention, and its merge where the context is split."""
    from clover_vllm.attention.triton.inputs import PagedTrees
    from clover_vllm.attention.triton.tree_attention import Partials, tree_attention

    dtype, kv_heads, page = getattr(torch, shape.dtype), 2, 16
    heads = kv_heads * shape.group
    query = torch.zeros(shape.rows, heads, shape.dim, dtype=dtype)
    cache = torch.zeros(16, page, kv_heads, 2 * shape.dim, dtype=getattr(torch, shape.cache or shape.dtype))
    one = torch.ones(1) if shape.cache else None
    trees = PagedTrees(
        block_table=torch.zeros(1, 16, dtype=torch.int32),
        query_start_loc=torch.zeros(2, dtype=torch.int32),
        seq_lens=torch.zeros(1, dtype=torch.int32),
        bits=torch.zeros(shape.rows, dtype=torch.int64),
        max_rows=shape.rows,
    )
    split = shape.splits > 1
    with _compiling(capability, str(shape)) as compiling:
        tree_attention(
            query,
            cache.transpose(1, 2),
            torch.empty_like(query),
            trees,
            shape.dim**-0.5,
            window=shape.window,
            key_scale=one,
            value_scale=one,
            partials=Partials.empty(shape.rows, heads, shape.splits, shape.dim, query.device)
            if split
            else None,
        )
    return compiling.found


def compile_others(capability: int) -> list[Compiled]:
    """What is done with trees of 25 nodes before and behind a step, and moving rows of head size 128."""
    from clover_vllm.attention.triton.cache_rows import CacheRows
    from clover_vllm.attention.triton.counts import count_trees, width_of
    from clover_vllm.attention.triton.slots import (
        HeadTensors,
        KeptTrees,
        lay_out_head,
        lay_out_trees,
        put_trees,
    )
    from clover_vllm.attention.triton.walk import walk_trees

    requests, nodes = 8, 25
    caches = [torch.zeros(4, 16, 8, 256, dtype=torch.bfloat16).transpose(1, 2)]
    index = torch.zeros(requests + 1, dtype=torch.int32)
    trees = torch.zeros(requests, nodes, dtype=torch.int32)
    emitted = torch.zeros(requests * (nodes + 1), dtype=torch.int64)
    with _compiling(capability, f"{nodes} nodes, head size 128, bfloat16") as compiling:
        sampled, num_sampled, path = walk_trees(
            emitted, index, index[:-1], emitted.view(requests, -1)[:, 1:], trees
        )
        CacheRows(caches).move_accepted(emitted, index[:-1], path, num_sampled)
        kept, slots = KeptTrees.make(requests, nodes, index.device), emitted[:requests]
        put_trees(
            kept,
            slots,
            kept.tokens,
            kept.parents,
            kept.probabilities,
            index,
            emitted.view(requests, -1),
            kept.tokens,
        )
        for bits in (emitted, None):
            lay_out_trees(kept, slots, index, index, index, emitted, bits)
        head = HeadTensors(*(emitted,) * 4, index, index, emitted, emitted)
        for taken in (path, None):
            lay_out_head(
                head,
                requests,
                1,
                slots=slots,
                query_start_loc=index,
                cu_num_logits=index,
                seq_lens=index,
                input_ids=index,
                cache_slots=emitted,
                sampled=sampled,
                path=taken,
                num_sampled=num_sampled,
                next_prefill_tokens=index,
            )
        counts = torch.zeros(width_of(nodes), dtype=torch.float64)
        count_trees(counts, kept, slots, index, path, num_sampled, kept.probabilities[:, 0])
    return compiling.found


def compile_kernels(settings: KernelsCompiledSettings) -> list[Compiled]:
    """Compile all, print a table, and write JSON.

    Raises:
        UserError: Triton is missing, or only its interpreter runs.
    """
    settings.check()
    if importlib.util.find_spec("triton") is None:
        raise UserError("Triton is not installed; install clover-vllm with the extra triton.")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise UserError("TRITON_INTERPRET is set, so kernels would not be compiled; unset it.")
    jobs = [
        (shape, capability)
        for shape in SHAPES
        for capability in settings.capabilities
        if shape.is_known(capability)
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # what is read from a cache was compiled by another version
        found = [made for job in each(jobs, "shapes") for made in compile_attention(*job)]
        for capability in settings.capabilities:
            found += compile_others(capability)
    table = Table(title="Kernels as compiled")
    for name in ("kernel", "shape", "sm", "registers", "spilled bytes", "shared bytes", "warps"):
        table.add_column(name)
    for made in found:
        table.add_row(*map(str, asdict(made).values()))
    print_table(table)
    if settings.output is not None:
        write_result(settings.output, "kernels-compiled.json", {"results": list(map(asdict, found))})
    return found
