"""Random steps over a paged key/value cache, as vLLM's GPU backends keep it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from clover_vllm.attention.triton.inputs import CAUSAL, PagedTrees
from clover_vllm.tree import Tree

LAYOUTS = {"LBHNC": (0, 1, 2, 3), "LBNHC": (0, 2, 1, 3), "BLNHC": None}
"""Orders in memory of a layer's [blocks, kv heads, block size, 2 D]; in the last, layers alternate by block."""


@dataclass(frozen=True)
class PagedRequest:
    """What a request has in the step."""

    context: int  # tokens in the cache before the step
    rows: int  # 0: padding
    tree: Tree | None = None  # of `rows` - 1 nodes; None: plain rows, a decode or a prompt chunk

    @property
    def bits(self) -> list[int]:
        return list(self.tree.masks) if self.tree is not None else [CAUSAL] * self.rows


@dataclass(frozen=True)
class PagedCase:
    """A step, and the cache it attends over. Slots without a token hold NaN."""

    requests: Sequence[PagedRequest]
    query: torch.Tensor  # [T, heads, D], a view into a wider projection
    cache: torch.Tensor  # [blocks, kv heads, block size, 2 D], strided as the layout says
    output: torch.Tensor  # [T, heads, D], random
    trees: PagedTrees
    scale: float

    def slots(self) -> torch.Tensor:
        """int64 [T], where each row's key and value lie."""
        page = self.cache.shape[2]
        found = [
            int(self.trees.block_table[r, place // page]) * page + place % page
            for r, request in enumerate(self.requests)
            for place in range(request.context, request.context + request.rows)
        ]
        return torch.tensor(found, dtype=torch.int64)

    def on(self, device: torch.device) -> PagedCase:
        """A copy on a device, with the same strides and the same gaps in memory."""
        trees = self.trees
        there = PagedTrees(
            moved(trees.block_table, device),
            moved(trees.query_start_loc, device),
            moved(trees.seq_lens, device),
            moved(trees.bits, device),
            trees.max_rows,
        )
        return replace(
            self,
            query=moved(self.query, device),
            cache=moved(self.cache, device),
            output=moved(self.output, device),
            trees=there,
        )


def random_tree(rng: random.Random, nodes: int) -> Tree:
    """Of random parents."""
    return Tree(list(range(nodes)), [rng.randrange(-1, node) for node in range(nodes)])


def make_case(
    requests: Sequence[PagedRequest],
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    kv_heads: int = 2,
    group: int = 3,
    dim: int = 64,
    page: int = 16,
    layout: str = "LBNHC",
    seed: int = 0,
) -> PagedCase:
    """Random numbers for `requests`, whose blocks are scattered over the cache."""
    generator = torch.Generator().manual_seed(seed)
    heads, rows = kv_heads * group, sum(request.rows for request in requests)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    counts = [-(-(request.context + request.rows) // page) for request in requests]
    blocks = sum(counts) + 2
    memory = torch.full(memory_shape(layout, blocks, kv_heads, page, 2 * dim), torch.nan, dtype=dtype)
    cache = layer_view(memory, layout)
    order = torch.randperm(blocks, generator=generator).int()
    table = order[-1].repeat(len(requests), max(1, *counts) + 1)  # a block that nobody has
    for r, (request, count) in enumerate(zip(requests, counts, strict=True)):
        table[r, :count], order = order[:count], order[count:]
        place = torch.arange(request.context + request.rows)
        cache[table[r, place // page].long(), :, place % page] = noise(len(place), kv_heads, 2 * dim)
    if cache_dtype is not None:
        cache = layer_view(memory.to(cache_dtype), layout)
    bits = [bit for request in requests for bit in request.bits]
    starts = torch.tensor([0, *(request.rows for request in requests)]).cumsum(0)
    trees = PagedTrees(
        block_table=table,
        query_start_loc=starts.int(),
        seq_lens=torch.tensor([request.context + request.rows for request in requests], dtype=torch.int32),
        bits=torch.tensor([*bits, *[CAUSAL] * 3]),  # the buffer is longer than the step
        max_rows=max((request.rows for request in requests if request.tree is not None), default=1),
    )
    query = noise(rows, heads + 2 * kv_heads, dim)[:, :heads]
    return PagedCase(requests, query, cache, noise(rows, heads, dim), trees, dim**-0.5)


def memory_shape(layout: str, blocks: int, kv_heads: int, page: int, content: int) -> tuple[int, ...]:
    """Of a layer's memory, or with alternating layers of two layers'."""
    logical = (blocks, kv_heads, page, content)
    order = LAYOUTS[layout]
    return (blocks, 2, page, kv_heads, content) if order is None else tuple(logical[i] for i in order)


def layer_view(memory: torch.Tensor, layout: str) -> torch.Tensor:
    """[blocks, kv heads, block size, content] of a layer."""
    order = LAYOUTS[layout]
    return memory[:, 1].transpose(1, 2) if order is None else memory.permute(order)


def memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """[elements], all that the tensor's memory holds."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of the whole memory, seen in the same way."""
    memory = memory_of(tensor).to(device, copy=True)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
