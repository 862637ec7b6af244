"""Tree attention on vLLM's paged key/value cache, in Triton.

The cache is what vLLM 0.32's GPU backends share: per layer a view of [blocks, kv heads, block size, 2 D] with the key
and the value of a slot and head behind each other, whatever the order in memory
(`vllm.v1.kv_cache_layout.KVCacheLayout`). The step's own keys and values are in it before attention runs.

A request's context may be split over programs, since a few rows of one long request would otherwise keep few of a
GPU's processors busy; a second kernel merges the parts (FlashDecoding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from clover_vllm.attention.triton.inputs import PagedTrees

LOG2_E = 1.4426950408889634

OWN_TILE = 16
"""Keys at a time where masks are needed: larger tiles spill registers on an A100."""


@dataclass(frozen=True)
class Partials:
    """What the parts of a split context leave for the merge. Persistent under CUDA graphs: make it once."""

    values: torch.Tensor  # float32 [R * max_rows, heads, splits, D], weighted sums of values
    maxima: torch.Tensor  # float32 [R * max_rows, heads, splits], of the scores times log2(e)
    sums: torch.Tensor  # float32 [R * max_rows, heads, splits], of the weights relative to that maximum

    @classmethod
    def empty(cls, rows: int, heads: int, splits: int, dim: int, device: torch.device) -> Partials:
        """For up to `rows` rows, which is requests times `PagedTrees.max_rows`; one serves all layers of these sizes."""
        shape = (rows, heads, splits)
        return cls(
            torch.empty(*shape, dim, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
        )

    @property
    def splits(self) -> int:
        return self.sums.shape[2]

    def view(self, rows: int, splits: int) -> Partials:
        """The first `rows` times `splits` parts of this memory, for `rows` rows."""
        _, heads, _, dim = self.values.shape
        parts = rows * splits
        return Partials(
            self.values[:parts].view(rows, heads, splits, dim),
            self.maxima[:parts].view(rows, heads, splits),
            self.sums[:parts].view(rows, heads, splits),
        )


@dataclass(frozen=True)
class Tiling:
    """How the kernel is cut."""

    block_m: int  # rows times query heads of a kv head in a program
    tile: int  # keys at a time
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, group: int, dim: int, itemsize: int, window: int = 0) -> Tiling:
        """For requests of up to `rows` rows, `group` query heads per kv head, elements of `itemsize` bytes.

        A stage takes 16 KB of a block's shared memory at head size 128, of which an L4 has 99 KB. With windows, more than
        3 stages need more registers than an A100 has.
        """
        if itemsize > 2:  # without tensor cores, which would round to tf32
            return cls(max(16, triton.next_power_of_2(group)), tile=32, warps=8, stages=2)
        largest = max(128 if dim <= 128 else 64, triton.next_power_of_2(group))
        block_m = max(16, min(largest, triton.next_power_of_2(rows * group)))
        warps = 8 if block_m >= 128 or dim > 128 else 4
        return cls(block_m, tile=32, warps=warps, stages=5 if dim <= 128 and not window else 3)

    def rows(self, group: int) -> int:
        """Rows of a request in a program."""
        return self.block_m // group

    def splits(self, requests: int, rows: int, group: int, kv_heads: int, dim: int, processors: int) -> int:
        """Parts of the context: the largest power of two, up to 16, with which all programs run at the same time.

        A processor runs 8 warps at a time, or 16 with heads of up to 64 channels: registers allow no more.
        """
        programs = max(1, requests * triton.cdiv(rows, self.rows(group)) * kv_heads)
        at_once = processors * max(1, (16 if dim <= 64 else 8) // self.warps)
        return 1 << min(4, max(1, at_once // programs).bit_length() - 1)


class SplitContexts:
    """How layers split the contexts of a step, and the memory for that: one of both for all layers of these sizes.

    It depends on how many requests and rows the step has, so it is the same whenever a captured graph runs again. Since
    more requests are split into fewer parts, the memory grows with the GPU's processors rather than with the requests:
    for trees of up to 25 nodes, 32 heads of size 128, 8 of them kv heads, and 132 processors it is 9 MB.
    """

    def __init__(
        self,
        requests: int,
        rows: int,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
        processors: int,
    ) -> None:
        """
        Args:
            requests: most of a step.
            rows: largest `PagedTrees.max_rows` of a step.
            heads: of queries.
            kv_heads: of keys and values.
            dim: channels of a head.
            dtype: of the output.
            device: of the step.
            processors: of the device that run at the same time (see `processors_of`).
        """
        group = heads // kv_heads

        def splits(requests: int, rows: int) -> int:
            tiling = Tiling.of(rows, group, dim, dtype.itemsize)
            return tiling.splits(requests, rows, group, kv_heads, dim, processors)

        few = min(requests, 2 * processors)  # more keep all processors busy without it
        found = {(r, n): splits(r, n) for r in range(1, few + 1) for n in range(1, rows + 1)}
        self._splits = {step: count for step, count in found.items() if count > 1}
        parts = [r * n * count for (r, n), count in self._splits.items()]
        self._memory = Partials.empty(max(parts, default=0), heads, 1, dim, device)
        self._views: dict[tuple[int, int], Partials] = {}

    def of(self, requests: int, rows: int) -> Partials | None:
        """For a step of `requests` requests, padding included, of up to `rows` rows; None: contexts are not split."""
        step = requests, rows
        if step in self._splits and step not in self._views:
            self._views[step] = self._memory.view(requests * rows, self._splits[step])
        return self._views.get(step)


def processors_of(device: torch.device) -> int:
    """Programs that a device runs side by side, one to a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1


def tree_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    output: torch.Tensor,
    trees: PagedTrees,
    scale: float,
    *,
    window: int = 0,
    all_rows: bool = False,
    query_scale: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    partials: Partials | None = None,
    tiling: Tiling | None = None,
) -> None:
    """Attend over context and draft tree. Without `all_rows`, requests without a tree keep what `output` holds.

    Args:
        query: [T, heads, D] in the output's dtype or float8_e4m3fn, D up to 256; a head's channels lie together.
        cache: [blocks, kv heads, block size, 2 D] in the output's dtype or float8_e4m3fn, of any strides but the last.
        output: [T, heads, D], float16, bfloat16 or float32.
        trees: of this step.
        scale: of the scores; the layer's.
        window: a row sees its last `window` positions alone, itself included; a node's position is its context's
            length plus its depth. 0: no window.
        all_rows: requests without a tree are attended too, causally.
        query_scale: float32, one element: of quantized queries (vLLM's `layer._q_scale`).
        key_scale: of quantized keys.
        value_scale: of quantized values.
        partials: for a context split into parts; without it, it is not split.
        tiling: how the kernel is cut; without it, by `Tiling.of`.
    """
    heads, dim = query.shape[1:]
    _, kv_heads, page, _ = cache.shape
    group, requests = heads // kv_heads, trees.seq_lens.shape[0]
    assert heads == group * kv_heads
    assert cache.shape[3] == 2 * dim <= 512
    assert query.stride(2) == output.stride(2) == cache.stride(3) == 1
    if tiling is None:
        tiling = Tiling.of(trees.max_rows, group, dim, output.element_size(), window)
    q_blocks = triton.cdiv(trees.max_rows, tiling.rows(group))
    splits = partials.splits if partials is not None else 1
    assert partials is None or partials.sums.shape[0] >= requests * trees.max_rows
    parts = (partials.values, partials.maxima, partials.sums) if partials is not None else (output,) * 3
    _attention_kernel[(requests * q_blocks, kv_heads, splits)](
        query,
        cache,
        output,
        *parts,
        trees.block_table,
        trees.query_start_loc,
        trees.seq_lens,
        trees.bits,
        query_scale,
        key_scale,
        value_scale,
        scale * LOG2_E,
        query.stride(0),
        query.stride(1),
        output.stride(0),
        output.stride(1),
        *cache.stride()[:3],
        trees.block_table.stride(0),
        q_blocks,
        trees.max_rows,
        PAGE=page,
        GROUP=group,
        DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_M=tiling.block_m,
        TILE=tiling.tile,
        OWN_TILE=OWN_TILE,
        SPLITS=splits,
        WINDOW=window,
        ALL_ROWS=all_rows,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if splits > 1:
        _merge_kernel[(requests * trees.max_rows, heads)](
            output,
            *parts,
            trees.query_start_loc,
            trees.bits,
            value_scale,
            output.stride(0),
            output.stride(1),
            trees.max_rows,
            DIM=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            SPLITS=splits,
            BLOCK_S=triton.next_power_of_2(splits),
            ALL_ROWS=all_rows,
            num_warps=1,
        )


@triton.jit
def _popcount(word):
    """Bits set in each int32; shifts bring the sign only where it is masked out."""
    count = word - ((word >> 1) & 0x55555555)
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F
    count += count >> 8
    count += count >> 16
    return count & 0x3F


@triton.jit
def _depth(bits, row):
    """A row's depth below its root: its ancestors in the tree, or the rows before it. Halves need fewer registers."""
    ancestors = _popcount(bits.to(tl.int32)) + _popcount((bits >> 32).to(tl.int32)) - 1
    return tl.where(bits == -1, row, ancestors)


@triton.jit
def _add_tile(
    start,
    query,
    row,
    bits,
    position,
    maximum,
    total,
    attended,
    page_of,
    block_table,
    own_bits,
    context,
    last,
    scale,
    stride_block,
    stride_slot,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    OWN: tl.constexpr,
):
    """One step of online softmax. OWN: the tile reaches the request's own rows; else all of it is context."""
    key = start + tl.arange(0, TILE)
    channel = tl.arange(0, BLOCK_D)
    inside = key < last
    block = tl.load(block_table + key // PAGE, mask=inside, other=0).to(tl.int64)
    slot = page_of + block * stride_block + (key % PAGE) * stride_slot
    read = inside[:, None] & (channel < DIM)[None, :]
    keys = tl.load(slot[:, None] + channel[None, :], mask=read, other=0.0).to(query.dtype)
    values = tl.load(slot[:, None] + DIM + channel[None, :], mask=read, other=0.0).to(query.dtype)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if OWN:
        own = key - context
        low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)  # half the registers of 64-bit shifts
        named = (tl.where((own < 32)[None, :], low[:, None], high[:, None]) >> (own & 31)[None, :]) & 1
        visible = (own < 0)[None, :] | ((own[None, :] <= row[:, None]) & (named == 1))
        visible = visible & inside[None, :]
        if WINDOW > 0:
            theirs = tl.load(own_bits + own, mask=inside & (own >= 0), other=0)
            places = tl.where(own < 0, key, context + _depth(theirs, own))
            visible = visible & (position[:, None] - places[None, :] < WINDOW)
        scores = tl.where(visible, scores, -float("inf"))
        # 0 times infinity would bring a node that overflows into rows that do not see it.
        finite = tl.abs(values.to(tl.float32)) < float("inf")
        broken = tl.sum((finite == 0).to(tl.int32), axis=1) > 0
        values = tl.where(finite, values, 0.0)
        sees_broken = tl.sum((visible & broken[None, :]).to(tl.int32), axis=1) > 0
        attended = tl.where(sees_broken[:, None], float("nan"), attended)
    elif WINDOW > 0:
        scores = tl.where(position[:, None] - key[None, :] < WINDOW, scores, -float("inf"))
    highest = tl.maximum(maximum, tl.max(scores, axis=1))
    reference = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp2(scores - reference[:, None])
    shrink = tl.exp2(maximum - reference)
    total = total * shrink + tl.sum(weights, axis=1)
    attended = attended * shrink[:, None]
    attended += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return highest, total, attended


@triton.jit(do_not_specialize=["q_blocks", "max_rows"])
def _attention_kernel(
    query,
    cache,
    output,
    partial_values,
    partial_maxima,
    partial_sums,
    block_table,
    query_start_loc,
    seq_lens,
    bits,
    query_scale,
    key_scale,
    value_scale,
    scale,
    stride_query,
    stride_query_head,
    stride_output,
    stride_output_head,
    stride_block,
    stride_head,
    stride_slot,
    stride_table,
    q_blocks,
    max_rows,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    OWN_TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    ALL_ROWS: tl.constexpr,
):
    """A program attends some rows of a request, those query heads that share a kv head, over a part of its tokens."""
    r = tl.program_id(0) // q_blocks
    first_row = tl.program_id(0) % q_blocks * (BLOCK_M // GROUP)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    first = tl.load(query_start_loc + r)
    rows = tl.load(query_start_loc + r + 1) - first
    if first_row >= rows:
        return
    if (tl.load(bits + first) == -1) & (not ALL_ROWS):
        return
    context = tl.load(seq_lens + r) - rows
    m = tl.arange(0, BLOCK_M)
    row = first_row + m // GROUP
    head = kv_head * GROUP + m % GROUP
    valid = (row < tl.minimum(rows, max_rows)) & (m < BLOCK_M // GROUP * GROUP)
    channel = tl.arange(0, BLOCK_D)
    mine = valid[:, None] & (channel < DIM)[None, :]
    place = (first + row).to(tl.int64)
    own_bits = tl.load(bits + first + row, mask=valid, other=-1)
    position = context + _depth(own_bits, row)
    q = tl.load(
        query + (place * stride_query + head * stride_query_head)[:, None] + channel[None, :],
        mask=mine,
        other=0.0,
    ).to(output.dtype.element_ty)
    if query_scale is not None:
        scale *= tl.load(query_scale)
    if key_scale is not None:
        scale *= tl.load(key_scale)

    last = context + tl.minimum(rows, first_row + BLOCK_M // GROUP)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(tl.min(tl.where(valid, position, last)) - WINDOW + 1, 0) // TILE
    tiles = tl.cdiv(last, TILE)
    part = tl.cdiv(tiles - low, SPLITS)
    begin = low + split * part
    end = tl.minimum(begin + part, tiles)
    shared = context // TILE  # tiles that are all context
    page_of = cache + kv_head.to(tl.int64) * stride_head
    table = block_table + r.to(tl.int64) * stride_table
    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    attended = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin * TILE, tl.minimum(end, shared) * TILE, TILE):
        maximum, total, attended = _add_tile(
            start, q, row, own_bits, position, maximum, total, attended, page_of, table, bits + first, context, last,
            scale, stride_block, stride_slot, PAGE, DIM, BLOCK_D, TILE, WINDOW, False,
        )  # fmt: skip
    for start in range(tl.maximum(begin, shared) * TILE, tl.minimum(end * TILE, last), OWN_TILE):
        maximum, total, attended = _add_tile(
            start, q, row, own_bits, position, maximum, total, attended, page_of, table, bits + first, context, last,
            scale, stride_block, stride_slot, PAGE, DIM, BLOCK_D, OWN_TILE, WINDOW, True,
        )  # fmt: skip

    if SPLITS == 1:
        attended /= tl.where(valid, total, 1.0)[:, None]
        if value_scale is not None:
            attended *= tl.load(value_scale)
        to = output + (place * stride_output + head * stride_output_head)[:, None] + channel[None, :]
        tl.store(to, attended.to(output.dtype.element_ty), mask=mine)
    else:
        part_of = ((r * max_rows + row).to(tl.int64) * (tl.num_programs(1) * GROUP) + head) * SPLITS + split
        tl.store(partial_maxima + part_of, maximum, mask=valid)
        tl.store(partial_sums + part_of, total, mask=valid)
        if begin < end:
            tl.store(partial_values + (part_of * DIM)[:, None] + channel[None, :], attended, mask=mine)


@triton.jit(do_not_specialize=["max_rows"])
def _merge_kernel(
    output,
    partial_values,
    partial_maxima,
    partial_sums,
    query_start_loc,
    bits,
    value_scale,
    stride_output,
    stride_output_head,
    max_rows,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ALL_ROWS: tl.constexpr,
):
    """One program per row and query head. A part without tokens has the sum 0, and its values were never written."""
    r = tl.program_id(0) // max_rows
    row = tl.program_id(0) % max_rows
    head = tl.program_id(1)
    first = tl.load(query_start_loc + r)
    if row >= tl.load(query_start_loc + r + 1) - first:
        return
    if (tl.load(bits + first) == -1) & (not ALL_ROWS):
        return
    place = (first + row).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_D)
    part_of = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head) * SPLITS + split
    maxima = tl.load(partial_maxima + part_of, mask=split < SPLITS, other=-float("inf"))
    sums = tl.load(partial_sums + part_of, mask=split < SPLITS, other=0.0)
    used = sums != 0
    weights = tl.where(used, tl.exp2(maxima - tl.max(maxima, axis=0)), 0.0)
    values = tl.load(
        partial_values + (part_of * DIM)[:, None] + channel[None, :],
        mask=used[:, None] & (channel < DIM)[None, :],
        other=0.0,
    )
    attended = tl.sum(values * weights[:, None], axis=0) / tl.sum(sums * weights, axis=0)
    if value_scale is not None:
        attended *= tl.load(value_scale)
    to = output + place * stride_output + head * stride_output_head + channel
    tl.store(to, attended.to(output.dtype.element_ty), mask=channel < DIM)
