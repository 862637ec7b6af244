"""Draft trees by request slot: keeping what was drafted, laying it out in a step, and what the head reads behind it.

One launch each, since a step of a large GPU is short. -1 is the token of a node that is none, the parent of a node under
the root, and the slot of a request that only fills a batch up to the size of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ROWS = 16
"""Rows of a request that a program of `lay_out_head` takes at a time."""


@dataclass(frozen=True)
class KeptTrees:
    """Of S request slots, with room for N nodes each."""

    tokens: torch.Tensor  # int64 [S, N], -1 in nodes that are not to be accepted
    parents: torch.Tensor  # int64 [S, N]
    bits: torch.Tensor  # int64 [S, N + 1], of root and nodes, see `PagedTrees.bits`
    depths: torch.Tensor  # int64 [S, N + 1]
    probabilities: torch.Tensor  # float32 [S, N], joint, as the head expects

    @classmethod
    def make(cls, slots: int, nodes: int, device: torch.device) -> KeptTrees:
        return cls(
            torch.full((slots, nodes), -1, dtype=torch.int64, device=device),
            torch.full((slots, nodes), -1, dtype=torch.int64, device=device),
            torch.ones((slots, nodes + 1), dtype=torch.int64, device=device),
            torch.zeros((slots, nodes + 1), dtype=torch.int64, device=device),
            torch.zeros((slots, nodes), dtype=torch.float32, device=device),
        )

    @property
    def nodes(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class HeadTensors:
    """What a head with a cache of its own reads after a step: H rows of R requests, or more."""

    source: torch.Tensor  # int64 [H], row of the step
    next_tokens: torch.Tensor  # int64 [H], the token behind each
    positions: torch.Tensor  # int64 [H]
    slots: torch.Tensor  # int64 [H], cache slot, or -1
    starts: torch.Tensor  # int32 [R + 1], first row of each request
    seq_lens: torch.Tensor  # int32 [R], tokens before and in the head's rows
    last: torch.Tensor  # int64 [R], each request's last row that is true
    requests: torch.Tensor  # int64 [R], slot of each request, or -1


def put_trees(
    kept: KeptTrees,
    slots: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    log_probs: torch.Tensor,
    total_lens: torch.Tensor,
    rules: torch.Tensor,
    drafts: torch.Tensor,
) -> None:
    """Keep trees of R requests.

    Args:
        kept: takes them.
        slots: int64 [R], or -1.
        tokens: int64 [R, M] of M nodes, at most N; a parent stands before its children.
        parents: int64 [R, M].
        log_probs: float32 [R, M], joint.
        total_lens: int32 [S], tokens that each request has.
        rules: int64 [S, 3 or more], most tokens of a request, whether only its tree's likeliest chain is kept, number
            of tokens by which it may end, those tokens. Nodes that would end it are not to be accepted.
        drafts: int64 [R, N], takes tokens that can be read as a step's inputs.
    """
    _put_kernel[(len(slots),)](
        slots,
        tokens.contiguous(),
        parents.contiguous(),
        log_probs.contiguous(),
        total_lens,
        rules,
        kept.tokens,
        kept.parents,
        kept.bits,
        kept.depths,
        kept.probabilities,
        drafts,
        tokens.shape[1],
        rules.stride(0),
        drafts.stride(0),
        NODES=kept.nodes,
        BLOCK=triton.next_power_of_2(kept.nodes + 1),
        num_warps=1,
    )


def lay_out_trees(
    kept: KeptTrees,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_num_logits: torch.Tensor,
    prefill_lens: torch.Tensor,
    positions: torch.Tensor,
    bits: torch.Tensor | None,
) -> None:
    """Positions and masks of the sampled rows of R requests, which are each one's last.

    A request whose root lies in its prompt verifies nothing: its nodes are dropped.

    Args:
        kept: trees by slot.
        slots: int64 [R].
        query_start_loc: int32 [R + 1], first row of each request.
        cu_num_logits: int32 [R + 1], first sampled row of each request.
        prefill_lens: int32 [S], tokens that each request began with.
        positions: int64 [rows], changed in place.
        bits: int64 [rows], takes the masks; None leaves positions and masks alone, as is right for chains.
    """
    _lay_out_kernel[(len(slots),)](
        slots,
        query_start_loc,
        cu_num_logits,
        prefill_lens,
        kept.bits,
        kept.depths,
        kept.tokens,
        positions,
        bits,
        NODES=kept.nodes,
        BLOCK=triton.next_power_of_2(kept.nodes + 1),
        num_warps=1,
    )


def lay_out_head(
    head: HeadTensors,
    padded: int,
    room: int,
    *,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_num_logits: torch.Tensor,
    seq_lens: torch.Tensor,
    input_ids: torch.Tensor,
    cache_slots: torch.Tensor,
    sampled: torch.Tensor,
    path: torch.Tensor | None,
    num_sampled: torch.Tensor,
    next_prefill_tokens: torch.Tensor,
) -> None:
    """The head's rows of R requests, whose number per request `head.starts` says.

    Args:
        head: takes them.
        padded: R or more requests, of which the others are none.
        room: rows that each of those has behind the others in a CUDA graph; they write no cache.
        slots: int64 [R].
        query_start_loc: int32 [R + 1], first row of each request in the step.
        cu_num_logits: int32 [R + 1], first sampled row of each request.
        seq_lens: int32 [R], tokens before and in the step's rows.
        input_ids: int32 [rows of the step].
        cache_slots: int64 [rows of the step].
        sampled: int64 [R, 1 or more], tokens that each request emitted, then anything.
        path: int32 [R, N], see `walk_trees`; None: no request verified anything.
        num_sampled: int32 [R], of the emitted tokens.
        next_prefill_tokens: int32 [S], the prompt's token behind the step's rows, where it goes on.
    """
    _rows_kernel[(padded,)](
        slots,
        query_start_loc,
        cu_num_logits,
        seq_lens,
        input_ids,
        cache_slots,
        sampled,
        path,
        num_sampled,
        next_prefill_tokens,
        head.starts,
        head.source,
        head.next_tokens,
        head.positions,
        head.slots,
        head.seq_lens,
        head.last,
        head.requests,
        len(slots),
        room,
        len(head.slots),
        sampled.shape[1],
        sampled.stride(0),
        path.stride(0) if path is not None else 0,
        BLOCK=ROWS,
        num_warps=1,
    )


@triton.jit(do_not_specialize=["width"])
def _put_kernel(
    slots,
    given_tokens,
    given_parents,
    given_log_probs,
    total_lens,
    rules,
    tokens,
    parents,
    bits,
    depths,
    probabilities,
    drafts,
    width,
    stride_rules,
    stride_drafts,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per request; its whole tree lies in registers."""
    r = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + r).to(tl.int64)
    if slot < 0:
        return
    node = tl.arange(0, BLOCK)
    given = node < width
    token = tl.load(given_tokens + r * width + node, mask=given, other=-1)
    parent = tl.load(given_parents + r * width + node, mask=given, other=-1)
    probability = tl.exp(tl.load(given_log_probs + r * width + node, mask=given, other=-float("inf")))
    rule = rules + slot * stride_rules
    chain = tl.load(rule + 1) != 0
    if chain:  # the likeliest: from each node to its first child
        found = tl.full([BLOCK], -1, tl.int64)
        expected = tl.zeros([BLOCK], tl.float32)
        above = tl.full([], -1, tl.int32)
        length = 0
        while above < BLOCK:
            children = (parent == above) & (token != -1)
            above = tl.min(tl.where(children, node, BLOCK), axis=0)
            place = (node == length) & (above < BLOCK)
            found = tl.where(place, tl.sum(tl.where(node == above, token, 0), axis=0), found)
            expected = tl.where(place, tl.sum(tl.where(node == above, probability, 0.0), axis=0), expected)
            length += 1
        token = found
        probability = expected
        parent = node.to(tl.int64) - 1
    mask = (tl.full([BLOCK], 1, tl.int64) << (node + 1).to(tl.int64)) | 1
    depth = tl.full([BLOCK], 1, tl.int64)
    ancestor = parent
    while tl.max(ancestor, axis=0) >= 0:
        inside = ancestor >= 0
        mask = tl.where(inside, mask | (tl.full([BLOCK], 1, tl.int64) << tl.maximum(ancestor + 1, 0)), mask)
        depth += inside.to(tl.int64)
        if chain:
            ancestor -= 1
        else:
            ancestor = tl.load(given_parents + r * width + ancestor, mask=inside, other=-1)
    ends = depth >= tl.load(rule) - tl.load(total_lens + slot)
    for i in range(tl.load(rule + 2).to(tl.int32)):
        ends = ends | (token == tl.load(rule + 3 + i))
    kept = node < NODES
    tl.store(tokens + slot * NODES + node, tl.where(ends, -1, token), mask=kept)
    tl.store(parents + slot * NODES + node, parent, mask=kept)
    tl.store(bits + slot * (NODES + 1) + 1 + node, mask, mask=kept)
    tl.store(depths + slot * (NODES + 1) + 1 + node, depth, mask=kept)
    tl.store(probabilities + slot * NODES + node, probability, mask=kept)
    tl.store(drafts + r * stride_drafts + node, tl.maximum(token, 0), mask=kept)


@triton.jit
def _lay_out_kernel(
    slots,
    query_start_loc,
    cu_num_logits,
    prefill_lens,
    bits,
    depths,
    tokens,
    positions,
    step_bits,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per request, over its sampled rows, which are its last."""
    r = tl.program_id(0)
    slot = tl.load(slots + r).to(tl.int64)
    rows = tl.load(cu_num_logits + r + 1) - tl.load(cu_num_logits + r)
    first = tl.load(query_start_loc + r + 1) - rows
    root = tl.load(positions + first)
    decodes = root >= tl.load(prefill_lens + slot)
    node = tl.arange(0, BLOCK)
    if decodes:
        if step_bits is not None:
            row = node < rows
            of_tree = slot * (NODES + 1) + node
            tl.store(step_bits + first + node, tl.load(bits + of_tree, mask=row), mask=row)
            tl.store(positions + first + node, root + tl.load(depths + of_tree, mask=row), mask=row)
    else:
        tl.store(tokens + slot * NODES + node, -1, mask=node < NODES)


@triton.jit(do_not_specialize=["requests", "room", "most_rows", "width", "stride_sampled", "stride_path"])
def _rows_kernel(
    request_slots,
    query_start_loc,
    cu_num_logits,
    seq_lens,
    input_ids,
    step_slots,
    sampled,
    path,
    num_sampled,
    next_prefill_tokens,
    starts,
    source,
    next_tokens,
    positions,
    slots,
    head_seq_lens,
    last,
    head_requests,
    requests,
    room,
    most_rows,
    width,
    stride_sampled,
    stride_path,
    BLOCK: tl.constexpr,
):
    """One program per request, or per place of a CUDA graph without one."""
    r = tl.program_id(0)
    begin = tl.load(starts + r)
    if r >= requests:
        first = begin + (r - requests) * room
        for i in range(0, room, BLOCK):
            place = first + i + tl.arange(0, BLOCK)
            tl.store(slots + place, -1, mask=(i + tl.arange(0, BLOCK) < room) & (place < most_rows))
        tl.store(head_seq_lens + r, 0)
        tl.store(last + r, 0)
        tl.store(head_requests + r, -1)
        return
    rows = tl.load(starts + r + 1) - begin
    slot = tl.load(request_slots + r)
    first = tl.load(query_start_loc + r)
    step_rows = tl.load(query_start_loc + r + 1) - first
    certain = step_rows - (tl.load(cu_num_logits + r + 1) - tl.load(cu_num_logits + r) - 1)
    base = tl.load(seq_lens + r) - step_rows
    emitted = tl.load(num_sampled + r)
    true = certain - 1 + tl.maximum(emitted, 1)
    prompt_goes_on = tl.load(next_prefill_tokens + slot).to(tl.int64)
    for i in range(0, rows, BLOCK):
        row = i + tl.arange(0, BLOCK)
        inside = row < rows
        node = row - certain + 1  # 0 at a root, below it in a prompt
        below = row
        if path is not None:
            accepted = tl.load(path + r * stride_path + node - 1, mask=inside & (node > 0), other=0)
            below = tl.where(node > 0, certain - 1 + accepted, row)
        behind = tl.load(input_ids + first + row + 1, mask=inside & (node < 0), other=0).to(tl.int64)
        place = r * stride_sampled + node
        token = tl.load(sampled + place, mask=inside & (node >= 0) & (node < width), other=0).to(tl.int64)
        token = tl.where(node < 0, behind, tl.where(emitted > 0, token, prompt_goes_on))
        is_true = row < true
        slot_of_row = tl.load(step_slots + first + row, mask=inside & is_true, other=-1)
        tl.store(source + begin + row, (first + below).to(tl.int64), mask=inside)
        tl.store(next_tokens + begin + row, tl.where(is_true, token, 0), mask=inside)
        tl.store(positions + begin + row, (base + row).to(tl.int64), mask=inside)
        tl.store(slots + begin + row, slot_of_row, mask=inside)
    tl.store(head_seq_lens + r, base + rows)
    tl.store(last + r, (begin + true - 1).to(tl.int64))
    tl.store(head_requests + r, slot)
