"""Moving the rows of accepted nodes behind their roots, in the caches of all layers in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

UNIT = 4
"""Bytes that a thread copies at a time."""


class CacheRows:
    """Moves rows within the caches of many layers that share a block table."""

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        """
        Args:
            caches: per layer, vLLM's [blocks, kv heads, block size, 2 D] view of any dtype; all of one shape and of
                the same strides, keys and values of a slot and head together.
        """
        first = caches[0]
        assert all(cache.shape == first.shape and cache.stride() == first.stride() for cache in caches)
        assert first.stride(3) == 1, "keys and values of a slot and head must lie together"
        size = first.element_size()
        measures = (first.shape[3] * size, *(stride * size for stride in first.stride()[:3]))
        assert all(measure % UNIT == 0 for measure in measures)
        assert all(cache.data_ptr() % UNIT == 0 for cache in caches)
        self._caches = list(caches)  # keeps the memory
        self._pointers = torch.tensor([c.data_ptr() for c in caches], dtype=torch.int64, device=first.device)
        self._width, *self._strides = (measure // UNIT for measure in measures)

    def move_accepted(
        self, slots: torch.Tensor, roots: torch.Tensor, path: torch.Tensor, num_sampled: torch.Tensor
    ) -> None:
        """Bring accepted nodes to where plain decoding would have put them.

        Args:
            slots: int64 [T], cache slot of every row of the step (vLLM's slot mapping).
            roots: int [R], row of each request's root in the step.
            path: int32 [R, N], by depth, the accepted node's row, counted from the root's (see `walk.walk_trees`).
            num_sampled: int32 [R], accepted nodes + 1; 0 or 1 moves nothing.
        """
        cache = self._caches[0]
        _move_kernel[(path.shape[0], len(self._caches), cache.shape[1])](
            self._pointers,
            slots,
            roots,
            path,
            num_sampled,
            path.stride(0),
            *self._strides,
            PAGE=cache.shape[2],
            WIDTH=self._width,
            BLOCK=triton.next_power_of_2(self._width),
            num_warps=min(4, triton.next_power_of_2(triton.cdiv(self._width, 32))),
        )


@triton.jit
def _move_kernel(
    pointers,
    slots,
    roots,
    path,
    num_sampled,
    stride_path,
    stride_block,
    stride_head,
    stride_slot,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per request, layer and head walks the path in order.

    Sources rise and never precede their destinations, so no destination is a later source, and no thread waits.
    """
    r = tl.program_id(0)
    accepted = tl.load(num_sampled + r) - 1
    root = tl.load(roots + r).to(tl.int64)
    page_of = tl.load(pointers + tl.program_id(1)).to(tl.pointer_type(tl.int32))
    page_of += tl.program_id(2).to(tl.int64) * stride_head
    column = tl.arange(0, BLOCK)
    for depth in range(accepted):
        row = tl.load(path + r * stride_path + depth)
        if row != depth + 1:
            source = tl.load(slots + root + row)
            destination = tl.load(slots + root + depth + 1)
            moved = tl.load(
                page_of + source // PAGE * stride_block + source % PAGE * stride_slot + column,
                mask=column < WIDTH,
            )
            tl.store(
                page_of + destination // PAGE * stride_block + destination % PAGE * stride_slot + column,
                moved,
                mask=column < WIDTH,
            )
