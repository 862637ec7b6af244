"""Tree attention on vLLM's CPU key/value cache: the native kernel, and plain PyTorch as reference.

A verifying request has rows (its root, then its draft nodes) in a step. Each row sees the request's
whole prefix, which lies in the paged cache, and those rows of the step that its bitmask names.

The cache is in one of two layouts of vLLM 0.32's (`vllm.v1.attention.backends.cpu_attn`): tensors of shape
[blocks, kv heads, block size, head dim] whose memory holds, per block and head,

- "vec": keys as [head dim][block size] and values as [block size][head dim];
- "amx", which vLLM takes for bfloat16 where a CPU has matrix tiles: keys as [block size / 16][head dim / 2][16][2]
  and values as [head dim / 16][block size / 2][16][2].
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from dataclasses import dataclass
from functools import cache

import torch

from clover_vllm.base.errors import UserError

logger = logging.getLogger("vllm.clover")  # below vLLM's logger, so that it stands in the engine's log

MAX_ROWS = 64
"""Rows per request and step; a row's visible rows are a 64-bit mask."""

LEVEL_VARIABLE = "CLOVER_KERNEL_LEVEL"
"""Names the instruction set that the kernel uses; without it, the highest that this CPU has."""

LAYOUTS = ("vec", "amx")
"""Of vLLM's CPU cache, those that are known here."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class TreeAttentionInputs:
    """What is the same for all layers of a step (built once per step)."""

    block_table: torch.Tensor  # int32 [R, blocks], cache blocks of each request, in order
    starts: torch.Tensor  # int32 [R], first row of each request
    stops: torch.Tensor  # int32 [R], behind its last row
    prefixes: torch.Tensor  # int32 [R], tokens of each request in the cache before this step
    masks: torch.Tensor  # int64 [N], bit j: the request's j-th row of this step is visible

    def __post_init__(self) -> None:
        for name in ("block_table", "starts", "stops", "prefixes"):
            assert getattr(self, name).dtype == torch.int32, f"{name} must be int32"
        assert self.masks.dtype == torch.int64, "masks must be int64"
        assert int((self.stops - self.starts).max()) <= MAX_ROWS


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    inputs: TreeAttentionInputs,
    scale: float,
    output: torch.Tensor,
    layout: str = "vec",
) -> None:
    """Attend with the native kernel where it was built, else in PyTorch.

    Args:
        query: [N, heads, D], D a multiple of 32; here and below a row's heads lie together.
        key: [N, kv heads, D], the step's own keys, rotated.
        value: [N, kv heads, D].
        key_cache: [blocks, kv heads, block size, D], block size a multiple of 32.
        value_cache: of the same form.
        inputs: of this step.
        scale: of the scores; the layer's.
        output: [N, heads, D], written where a request has rows.
        layout: of the caches, one of `LAYOUTS`.
    """
    kernel = native_kernel()
    if kernel is None:
        attended = tree_attention_reference(
            query, key, value, key_cache, value_cache, inputs, scale, layout=layout
        )
        for first, last in zip(inputs.starts.tolist(), inputs.stops.tolist(), strict=True):
            output[first:last] = attended[first:last]
        return
    failed = kernel(
        _DTYPES[query.dtype],
        LAYOUTS.index(layout),
        inputs.prefixes.shape[0],
        query.shape[1],
        key.shape[1],
        query.shape[2],
        key_cache.shape[2],
        key_cache.stride(0),
        key_cache.stride(1),
        query.stride(0),
        key.stride(0),
        value.stride(0),
        output.stride(0),
        inputs.block_table.stride(0),
        scale,
        inputs.block_table.data_ptr(),
        inputs.starts.data_ptr(),
        inputs.stops.data_ptr(),
        inputs.prefixes.data_ptr(),
        inputs.masks.data_ptr(),
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        output.data_ptr(),
    )
    assert not failed, f"the kernel does not know {query.dtype} in the layout {layout}"


@cache
def native_library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built, which is logged once per process."""
    found = importlib.util.find_spec("clover_vllm.attention.cpu._native")
    if found is None or found.origin is None:
        logger.warning(
            "The tree attention kernel was not built, so trees are verified in PyTorch, several times slower. "
            "Install a C++ compiler (g++ 12 or newer), then install clover-vllm again."
        )
        return None
    return ctypes.CDLL(found.origin)


def kernel_levels() -> list[str]:
    """Instruction sets for which the kernel was compiled and that this CPU has, lowest first.

    On x86-64 of `v2`, `v3` (AVX2), `v4` (AVX-512) and `amx` (tiles of bfloat16); elsewhere `baseline`. Empty where the kernel was not built.
    """
    library = native_library()
    if library is None:
        return []
    library.clover_levels.restype = ctypes.c_char_p
    return library.clover_levels().decode().split()


@cache
def native_kernel() -> ctypes._NamedFuncPointer | None:
    """Tree attention in the compiled library, or None where there is none for this CPU.

    Raises:
        UserError: the environment asks for a level that is not one of `kernel_levels`.
    """
    library = native_library()
    if library is None:
        return None
    levels = kernel_levels()
    if not levels:
        logger.warning(
            "The tree attention kernel needs a CPU with SSE4.2, so trees are verified in PyTorch, several times "
            "slower. Use a newer CPU."
        )
        return None
    asked = os.environ.get(LEVEL_VARIABLE)
    if asked is not None and asked not in levels:
        raise UserError(f"{LEVEL_VARIABLE}={asked} is not a level of this CPU; it has {', '.join(levels)}.")
    kernel = getattr(library, f"clover_tree_attention_{asked or levels[-1]}")
    kernel.argtypes = [
        *[ctypes.c_int] * 7,
        *[ctypes.c_int64] * 7,
        ctypes.c_float,
        *[ctypes.c_void_p] * 11,
    ]
    kernel.restype = ctypes.c_int
    return kernel


@cache
def places(layout: str, block: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the numbers of a block and head lie, in elements: int64 [block, D] of keys, and of values.

    Args:
        layout: one of `LAYOUTS`.
        block: slots.
        dim: D.
    """
    token, d = torch.arange(block)[:, None], torch.arange(dim)
    if layout == "vec":
        return d * block + token, token * dim + d
    keys = token // 16 * (16 * dim) + d // 2 * 32 + token % 16 * 2 + d % 2
    values = d // 16 * (16 * block) + token // 2 * 32 + d % 16 * 2 + token % 2
    return keys, values


def tree_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    inputs: TreeAttentionInputs,
    scale: float,
    dtype: torch.dtype = torch.float32,
    layout: str = "vec",
) -> torch.Tensor:
    """The same in plain PyTorch, computed in `dtype`; arguments as for `tree_attention`.

    Returns:
        [N, heads, D] in the query's dtype, or in `dtype` if that is float64.
    """
    _, kv_heads, block, dim = key_cache.shape
    group = query.shape[1] // kv_heads
    of_keys, of_values = places(layout, block, dim)
    out = torch.zeros(query.shape, dtype=dtype)
    for r in range(inputs.prefixes.shape[0]):
        first, last = int(inputs.starts[r]), int(inputs.stops[r])
        prefix = int(inputs.prefixes[r])
        used = inputs.block_table[r, : -(-prefix // block)].long()
        keys, values = (
            cached[used].flatten(2)[:, :, at].transpose(1, 2).reshape(-1, kv_heads, dim)[:prefix]
            for cached, at in ((key_cache, of_keys), (value_cache, of_values))
        )
        keys = torch.cat([keys, key[first:last]]).to(dtype).repeat_interleave(group, dim=1)
        values = torch.cat([values, value[first:last]]).to(dtype).repeat_interleave(group, dim=1)
        bits = torch.arange(last - first)
        own = (inputs.masks[first:last, None] >> bits) & 1
        visible = torch.cat([own.new_ones(last - first, prefix), own], dim=1).bool()
        scores = torch.einsum("nhd,thd->hnt", query[first:last].to(dtype), keys) * scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        if bool(values.isfinite().all()):
            out[first:last] = torch.einsum("hnt,thd->nhd", weights, values)
        else:  # 0 times infinity would reach rows that do not see it
            products = weights[..., None] * values.transpose(0, 1)[:, None]  # [heads, rows, tokens, D]
            out[first:last] = products.masked_fill(weights[..., None] == 0, 0).sum(2).transpose(0, 1)
    return out if dtype == torch.float64 else out.to(query.dtype)
