"""Triton kernels equal plain PyTorch in float64, and the C++ kernel of the CPU.

Collected where TRITON_INTERPRET=1 is set before Triton is imported; `tests/unit/attention/test_triton.py` starts them.
"""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from length import length

from clover_vllm.attention import TreeAttentionInputs, native_kernel
from clover_vllm.attention import tree_attention as tree_attention_on_cpu
from clover_vllm.attention.triton.cache_rows import CacheRows
from clover_vllm.attention.triton.reference import (
    move_accepted_reference,
    tree_attention_reference,
    walk_trees_reference,
)
from clover_vllm.attention.triton.tree_attention import Partials, SplitContexts, Tiling, tree_attention
from clover_vllm.attention.triton.walk import walk_trees
from clover_vllm.bench.gpu.paged import LAYOUTS, PagedCase, PagedRequest, make_case, random_tree
from clover_vllm.tree import Tree, walk

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}
DIMS = (64, 80, 96, 112, 128, 192, 256)


def random_requests(rng: random.Random, count: int, longest: int) -> list[PagedRequest]:
    """Trees, decodes, prompt chunks and padding, at least one tree among them."""

    def tree() -> PagedRequest:
        nodes = 63 if rng.random() < 0.1 else rng.randrange(20)
        return PagedRequest(rng.randrange(longest), nodes + 1, random_tree(rng, nodes))

    kinds = [
        tree,
        tree,
        lambda: PagedRequest(rng.randrange(1, longest + 1), 1),
        lambda: PagedRequest(rng.randrange(longest), rng.randrange(2, 80)),
        lambda: PagedRequest(0, 0),
    ]
    found = [tree(), *(rng.choice(kinds)() for _ in range(count - 1))]
    rng.shuffle(found)
    return found


def attend(case: PagedCase, splits: int = 1, **more: object) -> torch.Tensor:
    """What the kernel leaves in a copy of the case's output."""
    output = case.output.clone()
    _, heads, dim = output.shape
    rows = len(case.requests) * case.trees.max_rows
    partials = Partials.empty(rows, heads, splits, dim, output.device) if splits > 1 else None
    for tensor in (partials.values, partials.maxima, partials.sums) if partials is not None else ():
        tensor.fill_(torch.nan)
    tree_attention(
        case.query, case.cache, output, case.trees, case.scale, partials=partials, **more  # type: ignore[arg-type]
    )  # fmt: skip
    return output


def expect(case: PagedCase, **more: object) -> torch.Tensor:
    return tree_attention_reference(
        case.query, case.cache, case.output, case.trees, case.scale, **more  # type: ignore[arg-type]
    )  # fmt: skip


def assert_near(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Relative to the largest number."""
    assert (found.double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


def rows_without_tree(case: PagedCase) -> torch.Tensor:
    """bool [T]"""
    return torch.tensor([request.tree is None for request in case.requests for _ in range(request.rows)])


@pytest.mark.parametrize("seed", range(length(5, 1500)))
def test_tree_attention_equals_float64(seed: int) -> None:
    """Random trees, decodes, chunks and padding; layouts, heads, head sizes, splits, windows."""
    rng = random.Random(seed)
    dtype = rng.choice(list(TOLERANCE))
    case = make_case(
        random_requests(rng, rng.randrange(1, 5), rng.choice([1, 40, 200])),
        dtype=dtype,
        kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 3, 4, 7]),
        dim=DIMS[seed % len(DIMS)],
        page=rng.choice([16, 32]),
        layout=rng.choice(list(LAYOUTS)),
        seed=seed,
    )
    splits, window = rng.choice([1, 1, 2, 5]), rng.choice([0, 0, 1, 5, 64, 150])
    found = attend(case, splits, window=window)
    assert_near(found, expect(case, window=window), dtype)
    others = rows_without_tree(case)
    assert torch.equal(found[others], case.output[others])


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_all_rows_are_attended_where_that_is_asked_for(dtype: torch.dtype, window: int, splits: int) -> None:
    """A decode, a prompt chunk longer than any tree, a prompt's first chunk, beside a tree and padding."""
    rng = random.Random(0)
    requests = [
        PagedRequest(70, 1),
        PagedRequest(40, 90),
        PagedRequest(50, 12, random_tree(rng, 11)),
        PagedRequest(0, 0),
        PagedRequest(0, 17),
    ]
    case = make_case(requests, dtype=dtype, group=1, kv_heads=1)
    case = replace(case, trees=replace(case.trees, max_rows=90))
    assert_near(
        attend(case, splits, window=window, all_rows=True),
        expect(case, window=window, all_rows=True),
        dtype,
    )


@pytest.mark.parametrize("splits", [1, 2])
def test_steps_without_trees_are_left_alone(splits: int) -> None:
    """Padding, a decode, padding again."""
    case = make_case([PagedRequest(0, 0), PagedRequest(9, 1), PagedRequest(0, 0)], group=1)
    assert torch.equal(attend(case, splits), case.output)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("dim", [64, 96])
def test_tree_attention_equals_the_kernel_of_the_cpu(dim: int, dtype: torch.dtype) -> None:
    """The same step, its cache in the layout that the C++ kernel reads."""
    assert native_kernel() is not None
    rng = random.Random(dim)
    requests = [
        PagedRequest(context, nodes + 1, random_tree(rng, nodes))
        for context, nodes in [(77, 25), (0, 8), (130, 63)]
    ]
    case = make_case(requests, dtype=dtype, dim=dim, page=32, kv_heads=1)
    keys, values = case.cache.split(dim, dim=-1)
    starts = case.trees.query_start_loc
    slots = case.slots()
    output = torch.empty_like(case.output)
    tree_attention_on_cpu(
        case.query,
        keys[slots // 32, :, slots % 32].contiguous(),
        values[slots // 32, :, slots % 32].contiguous(),
        keys.transpose(2, 3).contiguous().view(keys.shape),
        values.contiguous(),
        TreeAttentionInputs(
            block_table=case.trees.block_table,
            starts=starts[:-1].contiguous(),
            stops=starts[1:].contiguous(),
            prefixes=case.trees.seq_lens - starts.diff(),
            masks=case.trees.bits,
        ),
        case.scale,
        output,
    )
    found = attend(case, splits=2)
    assert (found - output).abs().max() <= 2 * TOLERANCE[dtype] * output.abs().max()


def test_quantized_keys_and_values_are_scaled() -> None:
    """fp8 in the cache, and fp8 queries as vLLM's attention layer gives them."""
    rng = random.Random(0)
    requests = [PagedRequest(60, 9, random_tree(rng, 8)), PagedRequest(0, 3, random_tree(rng, 2))]
    case = make_case(requests, dtype=torch.float16, cache_dtype=torch.float8_e4m3fn)
    scales = {
        "query_scale": torch.tensor([0.7]),
        "key_scale": torch.tensor([1.3]),
        "value_scale": torch.tensor([0.6]),
    }
    for query in (case.query, case.query.to(torch.float8_e4m3fn)):
        for splits in (1, 2):
            of_query = replace(case, query=query)
            assert_near(attend(of_query, splits, **scales), expect(of_query, **scales), torch.float16)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
@pytest.mark.parametrize("context", [0, 61])
def test_numbers_that_overflow_stay_with_the_rows_that_see_them(
    context: int, broken: float, splits: int
) -> None:
    """A draft must not change its siblings, above all not the root."""
    tree = Tree(range(8), [-1, 0, -1, 2, 2, 0, 4, 1])
    case = make_case([PagedRequest(context, 9, tree), PagedRequest(30, 1)], dtype=torch.float16)
    before = attend(case, splits)
    slot = int(case.slots()[3])
    sees = torch.tensor([bool(mask >> 3 & 1) for mask in tree.masks] + [False])
    for part in (slice(64, None), slice(None)):  # its value, then its key as well
        case.cache[slot // 16, :, slot % 16, part] = broken
        after = attend(case, splits)
        assert torch.equal(after[~sees], before[~sees])
        assert not after[sees].isfinite().any()


def test_nodes_do_not_see_their_siblings() -> None:
    """Changing a row's value changes only the rows that descend from it."""
    tree = random_tree(random.Random(3), 20)
    case = make_case([PagedRequest(33, 21, tree)], group=1)
    before = attend(case)
    slot = int(case.slots()[2])
    case.cache[slot // 16, :, slot % 16, 64:] += 1.0
    changed = (before != attend(case)).flatten(1).any(dim=1)
    assert changed.tolist() == [bool(mask >> 2 & 1) for mask in tree.masks]


def test_a_chain_of_bits_is_plain_causal_attention() -> None:
    """So a request may come as a tree or without bits: the numbers are the same."""
    chain = make_case([PagedRequest(45, 6, Tree.chain(range(5)))], dtype=torch.float16)
    plain = replace(chain, trees=replace(chain.trees, bits=torch.full_like(chain.trees.bits, -1)))
    for window in (0, 4):
        assert torch.equal(
            attend(chain, window=window, all_rows=True), attend(plain, window=window, all_rows=True)
        )


@pytest.mark.parametrize("group", [1, 3, 8, 71])
@pytest.mark.parametrize("dim", [64, 256])
def test_a_program_has_whole_rows(dim: int, group: int) -> None:
    for rows in (1, 9, 26, 64):
        tiling = Tiling.of(rows, group, dim, 2)
        assert tiling.rows(group) >= 1
        assert tiling.block_m >= 16
        few, many = (tiling.splits(requests, rows, group, 8, dim, 132) for requests in (1, 64))
        assert few >= many == 1


def test_all_programs_run_at_the_same_time() -> None:
    """The numbers of parts that were the fastest on an H200, by requests; heads of 64 channels need fewer registers."""
    for dim, fastest in ((128, {1: 16, 8: 2, 32: 1, 128: 1}), (64, {1: 16, 8: 4})):
        tiling = Tiling.of(27, 4, dim, 2)
        assert {n: tiling.splits(n, 27, 4, 8, dim, 132) for n in fastest} == fastest


def split_contexts(requests: int, rows: int) -> SplitContexts:
    """On a GPU of 48 processors, for cases of 2 kv heads and a group of 3."""
    return SplitContexts(requests, rows, 6, 2, 64, torch.float32, torch.device("cpu"), processors=48)


@pytest.mark.parametrize("alone", [True, False])
def test_layers_of_the_engine_split_contexts(alone: bool) -> None:
    """As many parts as the processors ask for, in memory that all layers share."""
    from clover_vllm.engine.backends.gpu import TREES, TreeAttentionImpl, TreeRows

    class Base:
        def forward(self, *given: Any) -> None:
            given[6][:] = 7.0  # the output

    class Impl(TreeAttentionImpl, Base):  # type: ignore[misc]
        pass

    rng = random.Random(1)
    requests = [
        PagedRequest(150, 13, random_tree(rng, 12)),
        PagedRequest(3, 13, random_tree(rng, 12)),
        PagedRequest(90, 1),
    ]
    case = make_case(requests)
    if not alone:
        case.output[:] = 7.0  # what vLLM's own attention leaves
    layer: Any = Impl()
    layer.scale, layer.sliding_window, layer.contexts = case.scale, (-1, -1), split_contexts(8, 13)
    parts = layer.contexts.of(3, 13)
    assert parts.splits == 4
    for tensor in (parts.values, parts.maxima, parts.sums):
        tensor.fill_(torch.nan)
    output = case.output.clone()
    metadata = SimpleNamespace(**{TREES: TreeRows(case.trees, alone)})
    layer.forward(None, case.query, None, None, case.cache, metadata, output)
    assert_near(output, expect(case, all_rows=alone), torch.float32)
    assert not parts.values.isnan().all()


def test_more_requests_are_split_into_fewer_parts_and_all_fit() -> None:
    contexts = split_contexts(64, 9)
    for rows in range(1, 10):
        splits = []
        for requests in range(1, 65):
            parts = contexts.of(requests, rows)
            assert parts is contexts.of(requests, rows)
            splits.append(parts.splits if parts is not None else 1)
            assert parts is None or parts.values.shape == (requests * rows, 6, splits[-1], 64)
        assert splits == sorted(splits, reverse=True)
        assert splits[0] == 16
        assert splits[-1] == 1


def random_drafts(
    rng: random.Random, slots: int, nodes: int
) -> tuple[list[Tree], torch.Tensor, torch.Tensor]:
    """Trees by request slot, with their padded tokens and parents; some tokens are the same in other branches."""
    trees: list[Tree] = []
    tokens, parents = torch.full((slots, nodes), -1), torch.full((slots, nodes), -1)
    for slot in range(slots):
        own: list[tuple[int, int]] = []
        for node in range(rng.randrange(nodes + 1)):
            parent = rng.randrange(-1, node)
            if (parent, token := rng.randrange(3)) not in own:
                own.append((parent, token))
            else:
                own.append((parent, 100 + node))
        trees.append(Tree([token for _, token in own], [parent for parent, _ in own]))
        tokens[slot, : len(own)] = torch.tensor([token for _, token in own], dtype=torch.int64)
        parents[slot, : len(own)] = torch.tensor([parent for parent, _ in own], dtype=torch.int64)
    return trees, tokens, parents


@pytest.mark.parametrize("seed", range(length(3, 400)))
def test_the_walk_on_the_device_is_the_walk(seed: int) -> None:
    """Whole trees, trees that the scheduler cut, requests without drafts or without a sampled row."""
    rng = random.Random(seed)
    nodes, slots, requests = rng.choice([1, 5, 25, 63]), 9, 6
    trees, tokens, parents = random_drafts(rng, slots, nodes)
    counts = [rng.choice([nodes + 1, nodes + 1, rng.randrange(1, nodes + 2), 1, 0]) for _ in range(requests)]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    of_request = rng.sample(range(slots), requests)
    emitted = torch.tensor([rng.randrange(3) for _ in range(sum(counts))], dtype=torch.int64)
    given = (emitted, starts, torch.tensor(of_request, dtype=torch.int32), tokens, parents.int())
    sampled, num_sampled, path = walk_trees(*given)
    for found, exact in zip((sampled, num_sampled, path), walk_trees_reference(*given), strict=True):
        assert found.dtype == exact.dtype
        assert torch.equal(found, exact)
    for r, slot in enumerate(of_request):
        own = emitted[int(starts[r]) : int(starts[r + 1])].tolist()
        if own:
            accepted = walk(trees[slot].prefix(len(own) - 1), own)
            rows = [0, *(node + 1 for node in accepted)]
            assert int(num_sampled[r]) == len(rows)
            assert path[r, : len(accepted)].tolist() == rows[1:]
            assert sampled[r, : len(rows)].tolist() == [own[row] for row in rows]


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_accepted_rows_move_behind_their_roots(dtype: torch.dtype, layout: str) -> None:
    """In all layers, across blocks, and nothing else changes."""
    rng = random.Random(0)
    requests = [
        PagedRequest(13, 20, random_tree(rng, 19)),
        PagedRequest(30, 8, random_tree(rng, 7)),
        PagedRequest(3, 1),
    ]
    requests += [PagedRequest(50, 33, random_tree(rng, 32)), PagedRequest(0, 0)]
    case = make_case(requests, layout=layout, dim=80)
    layers = [case.cache.nan_to_num().mul(factor).to(dtype) for factor in (1, 2, 3)]
    expected = [layer.clone() for layer in layers]
    path = torch.zeros(len(requests), 32, dtype=torch.int32)
    num_sampled = torch.tensor([5, 3, 1, 9, 0], dtype=torch.int32)
    for r, count in enumerate(num_sampled.tolist()):
        rows = sorted(rng.sample(range(1, max(2, requests[r].rows)), max(0, count - 1)))
        path[r, : len(rows)] = torch.tensor(rows, dtype=torch.int32)
    given = (case.slots(), case.trees.query_start_loc[:-1], path, num_sampled)
    CacheRows(layers).move_accepted(*given)
    move_accepted_reference(expected, *given)
    assert not torch.equal(expected[0].float(), case.cache.nan_to_num().to(dtype).float())
    for found, exact in zip(layers, expected, strict=True):
        assert torch.equal(found.float(), exact.float())


def test_walked_paths_move_what_plain_decoding_would_have_written() -> None:
    """After walk and move, the accepted rows lie behind the root in the order of the path."""
    tree = Tree([4, 7, 8, 9, 5], [-1, -1, 1, 2, 0])
    case = make_case([PagedRequest(30, 6, tree)], page=16)
    slots = case.slots()
    before = case.cache.clone()
    emitted = torch.tensor([7, 0, 8, 9, 6, 0])
    sampled, num_sampled, path = walk_trees(
        emitted,
        torch.tensor([0, 6], dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([tree.tokens]),
        torch.tensor([tree.parents]),
    )
    assert sampled.tolist() == [[7, 8, 9, 6, -1, -1]]
    CacheRows([case.cache]).move_accepted(slots, torch.zeros(1, dtype=torch.int32), path, num_sampled)

    def row(cache: torch.Tensor, r: int) -> torch.Tensor:
        return cache[slots[r] // 16, :, slots[r] % 16]

    for depth, source in enumerate([2, 3, 4], 1):
        assert torch.equal(row(case.cache, depth), row(before, source))
