"""The native kernel computes what PyTorch computes in float64, on vLLM's own packed cache."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import pytest
import torch

from clover_vllm.attention import (
    TreeAttentionInputs,
    native_kernel,
    tree_attention,
    tree_attention_reference,
)
from clover_vllm.attention.cpu.cache_rows import CacheRows
from clover_vllm.attention.cpu.tree_attention import (
    LAYOUTS,
    LEVEL_VARIABLE,
    kernel_levels,
    native_library,
    places,
)
from clover_vllm.base.errors import UserError

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
KINDS = [*((dtype, "vec") for dtype in TOLERANCE), (torch.bfloat16, "amx")]
SCALE = 64**-0.5
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, TreeAttentionInputs]


def tree_masks(sizes: list[int], seed: int) -> torch.Tensor:
    """Bitmasks of random trees: a row sees its ancestors and itself."""
    rng = random.Random(seed)
    masks: list[int] = []
    for size in sizes:
        own: list[int] = []
        for i in range(size):
            own.append((own[rng.randrange(i)] if i else 0) | 1 << i)
        masks += own
    return torch.tensor([m - (1 << 64) if m >> 63 else m for m in masks])


def make(
    dtype: torch.dtype,
    sizes: list[int],
    prefixes: list[int],
    heads: int = 9,
    kv_heads: int = 3,
    dim: int = 64,
    block: int = 128,
    layout: str = "vec",
) -> Case:
    """Random rows and a packed cache; unused slots hold NaN."""
    torch.manual_seed(0)
    counts = [-(-p // block) for p in prefixes]
    blocks = sum(counts) + 2
    cache = torch.full((blocks, kv_heads, 2 * block, dim), torch.nan, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    order = torch.randperm(blocks).int()
    table = torch.zeros(len(sizes), max(1, *counts), dtype=torch.int32)
    for r, count in enumerate(counts):
        table[r, :count], order = order[:count], order[count:]
        if prefixes[r]:
            position = torch.arange(prefixes[r])
            slots = table[r][position // block].long() * block + position % block
            for pages, at in zip((key_cache, value_cache), places(layout, block, dim), strict=True):
                packed = torch.randn(prefixes[r], dim, kv_heads).to(dtype)
                pages.view(blocks, kv_heads, -1)[(slots // block)[:, None], :, at[slots % block]] = packed
    rows, stops = sum(sizes), torch.tensor(sizes).cumsum(0).int()
    # As in a model: query, key and value are views into one projection.
    qkv = torch.randn(rows, heads + 2 * kv_heads, dim).to(dtype)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
    inputs = TreeAttentionInputs(
        block_table=table,
        starts=stops - torch.tensor(sizes, dtype=torch.int32),
        stops=stops,
        prefixes=torch.tensor(prefixes, dtype=torch.int32),
        masks=tree_masks(sizes, 0),
    )
    return query, key, value, key_cache, value_cache, inputs


@pytest.fixture(params=kernel_levels())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set of this CPU in turn."""
    monkeypatch.setenv(LEVEL_VARIABLE, request.param)
    native_kernel.cache_clear()
    yield request.param
    native_kernel.cache_clear()


def test_kernel_was_built() -> None:
    """The environment that tests run in has a compiler; elsewhere PyTorch takes over."""
    assert native_kernel() is not None


def test_the_highest_level_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
    native_kernel.cache_clear()
    kernel = native_kernel()
    assert kernel is not None
    assert kernel.__name__ == f"clover_tree_attention_{kernel_levels()[-1]}"


def test_a_level_can_be_asked_for(level: str) -> None:
    kernel = native_kernel()
    assert kernel is not None
    assert kernel.__name__ == f"clover_tree_attention_{level}"


def test_a_level_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "v9")
    native_kernel.cache_clear()
    with pytest.raises(
        UserError, match=f"v9 is not a level of this CPU; it has {', '.join(kernel_levels())}"
    ):
        native_kernel()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kv_heads", "dim", "block"), [(3, 64, 128), (1, 96, 32)])
def test_places_are_where_vllm_packs(layout: str, kv_heads: int, dim: int, block: int) -> None:
    if layout == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX")
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    cache = torch.full((2, kv_heads, 2 * block, dim), torch.nan, dtype=torch.bfloat16)
    key_cache, value_cache = cache.chunk(2, dim=2)
    rows = torch.randn(2, 2 * block, kv_heads, dim).bfloat16()
    slots = torch.arange(2 * block)
    ops.cpu_attn_reshape_and_cache(
        *rows, key_cache, value_cache, slots, layout, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    for pages, own, at in zip((key_cache, value_cache), rows, places(layout, block, dim), strict=True):
        for page, packed in zip(pages, own.split(block), strict=True):
            assert torch.equal(page.flatten(1)[:, at].transpose(0, 1), packed)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("dtype", "layout"), KINDS)
@pytest.mark.parametrize(
    ("sizes", "prefixes"),
    [
        ([9], [300]),
        ([1], [100]),
        ([9, 1, 5], [1, 128, 517]),
        ([33, 26], [257, 2000]),
        ([64], [70]),
        ([5, 3], [0, 3]),
        ([9] * 16, [37 * r + 1 for r in range(16)]),
    ],
)
def test_kernel_equals_float64(
    dtype: torch.dtype, layout: str, sizes: list[int], prefixes: list[int]
) -> None:
    query, key, value, key_cache, value_cache, inputs = make(dtype, sizes, prefixes, layout=layout)
    output = torch.empty_like(query)
    tree_attention(query, key, value, key_cache, value_cache, inputs, SCALE, output, layout)
    exact = tree_attention_reference(
        query, key, value, key_cache, value_cache, inputs, SCALE, torch.float64, layout
    )
    assert (output.double() - exact).abs().max() < TOLERANCE[dtype] * max(1.0, float(exact.abs().max()))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("dtype", "layout"), [(torch.float32, "vec"), (torch.bfloat16, "amx")])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block"), [(32, 8, 128, 32), (4, 4, 96, 64), (6, 1, 32, 128)]
)
def test_kernel_takes_other_shapes(
    dtype: torch.dtype, layout: str, heads: int, kv_heads: int, dim: int, block: int
) -> None:
    query, key, value, key_cache, value_cache, inputs = make(
        dtype, [9, 17], [65, 300], heads, kv_heads, dim, block, layout
    )
    output = torch.empty_like(query)
    tree_attention(query, key, value, key_cache, value_cache, inputs, SCALE, output, layout)
    exact = tree_attention_reference(
        query, key, value, key_cache, value_cache, inputs, SCALE, torch.float64, layout
    )
    assert (output.double() - exact).abs().max() < TOLERANCE[dtype] * max(1.0, float(exact.abs().max()))


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.LogCaptureFixture]:
    """What reaches vLLM's logger, which may keep its records from the root logger."""
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_pytorch_takes_over_where_the_kernel_was_not_built_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    query, key, value, key_cache, value_cache, inputs = make(torch.float32, [9], [40])
    with_kernel, without = torch.empty_like(query), torch.empty_like(query)
    tree_attention(query, key, value, key_cache, value_cache, inputs, SCALE, with_kernel)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    native_library.cache_clear()
    native_kernel.cache_clear()
    try:
        for _ in range(2):
            tree_attention(query, key, value, key_cache, value_cache, inputs, SCALE, without)
    finally:
        native_library.cache_clear()
        native_kernel.cache_clear()
    torch.testing.assert_close(without, with_kernel, atol=1e-5, rtol=0)
    (record,) = [r for r in log.records if "kernel was not built" in r.message]
    assert record.levelno == logging.WARNING
    assert "several times slower" in record.message
    assert "Install a C++ compiler" in record.message


def test_a_cpu_below_all_levels_falls_back_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("clover_vllm.attention.cpu.tree_attention.kernel_levels", lambda: [])
    native_kernel.cache_clear()
    try:
        assert native_kernel() is None
    finally:
        native_kernel.cache_clear()
    assert "needs a CPU with SSE4.2" in log.text


def test_nodes_do_not_see_their_siblings() -> None:
    """Changing a row's key and value changes only the rows that descend from it."""
    query, key, value, key_cache, value_cache, inputs = make(torch.float32, [9], [40])
    before, after = torch.empty_like(query), torch.empty_like(query)
    tree_attention(query, key, value, key_cache, value_cache, inputs, SCALE, before)
    value[4] += 1.0
    tree_attention(query, key, value, key_cache, value_cache, inputs, SCALE, after)
    changed = (before != after).flatten(1).any(dim=1)
    assert changed.tolist() == [bool(int(m) >> 4 & 1) for m in inputs.masks]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
@pytest.mark.parametrize("prefix", [0, 40, 125])
@pytest.mark.parametrize("reference", [False, True])
def test_infinite_values_stay_with_the_rows_that_see_them(
    broken: float, prefix: int, reference: bool
) -> None:
    """A draft whose numbers overflow must not change its siblings, above all not the root."""
    query, key, value, key_cache, value_cache, inputs = make(torch.float16, [9], [prefix])

    def attend() -> torch.Tensor:
        if reference:
            return tree_attention_reference(query, key, value, key_cache, value_cache, inputs, SCALE)
        output = torch.empty_like(query)
        tree_attention(query, key, value, key_cache, value_cache, inputs, SCALE, output)
        return output

    before = attend()
    sees = torch.tensor([bool(int(m) >> 4 & 1) for m in inputs.masks])
    value[4] = broken
    after = attend()
    torch.testing.assert_close(after[~sees], before[~sees], atol=1e-3, rtol=0)
    assert not after[sees].isfinite().any()
    key[4] = broken
    torch.testing.assert_close(attend()[~sees], before[~sees], atol=1e-3, rtol=0)


def both(case: Case, layout: str = "vec") -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel and the reference give."""
    query, key, value, key_cache, value_cache, inputs = case
    output = torch.empty_like(query)
    tree_attention(query, key, value, key_cache, value_cache, inputs, SCALE, output, layout)
    expected = tree_attention_reference(
        query, key, value, key_cache, value_cache, inputs, SCALE, layout=layout
    )
    return output, expected


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("prefix", [0, 1, 40, 125, 300])
@pytest.mark.parametrize("node", [0, 4, 8])
def test_a_nan_key_of_the_step_gives_nan_in_the_rows_that_see_it_alone(
    dtype: torch.dtype, prefix: int, node: int
) -> None:
    case = make(dtype, [9, 4], [prefix, 50])
    before, _ = both(case)
    case[1][node] = torch.nan
    sees = torch.tensor([bool(int(m) >> node & 1) for m in case[5].masks[:9]] + [False] * 4)
    for after in both(case):
        assert after[sees].isnan().all()
        torch.testing.assert_close(after[~sees], before[~sees], atol=1e-2, rtol=0)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("dtype", "layout"), KINDS)
@pytest.mark.parametrize("broken", [(0, 1), (15, 16), (77, 78), (299, 300), (0, 128), (128, 300), (0, 300)])
def test_nan_keys_of_the_prefix_give_nan_in_all_rows_of_their_request(
    dtype: torch.dtype, layout: str, broken: tuple[int, int]
) -> None:
    """Also where a whole block or the whole prefix is NaN, in one of several requests and one of three heads."""
    case = make(dtype, [9, 4], [300, 300], layout=layout)
    before, _ = both(case, layout)
    key_cache, inputs = case[3], case[5]
    blocks, kv_heads, block, dim = key_cache.shape
    packed = key_cache.view(blocks, kv_heads, -1)
    of_keys, _ = places(layout, block, dim)
    for token in range(*broken):
        packed[inputs.block_table[1, token // block], 2, of_keys[token % block]] = torch.nan
    for after in both(case, layout):
        assert after[9:, 6:].isnan().all()
        torch.testing.assert_close(after[:9], before[:9], atol=1e-2, rtol=0)
        torch.testing.assert_close(after[9:, :6], before[9:, :6], atol=1e-2, rtol=0)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("count", [1, 40])
def test_a_row_whose_only_visible_keys_are_nan_is_nan(count: int) -> None:
    """Its scores have no maximum."""
    case = make(torch.float32, [count], [0])
    case[1][:] = torch.nan
    for after in both(case):
        assert after.isnan().all()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("prefix", [0, 40, 300])
def test_a_nan_query_gives_nan_in_its_own_row_alone(prefix: int) -> None:
    case = make(torch.float32, [9], [prefix])
    before, _ = both(case)
    case[0][3] = torch.nan
    others = [row for row in range(9) if row != 3]
    for after in both(case):
        assert after[3].isnan().all()
        torch.testing.assert_close(after[others], before[others], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "layout"), KINDS)
def test_rows_move_within_and_between_blocks(dtype: torch.dtype, layout: str) -> None:
    """Native and PyTorch moves agree, and everything else stays."""
    torch.manual_seed(0)
    caches = [torch.randn(5, 3, 32, 128).to(dtype) for _ in range(2)]
    sources, destinations = [9, 40, 41, 100], [7, 30, 40, 99]
    native, plain = [c.clone() for c in caches], [c.clone() for c in caches]
    CacheRows(native, layout).move(sources, destinations)
    CacheRows(plain, layout)._move_in_torch(torch.tensor(sources), torch.tensor(destinations))
    of_keys, of_values = places(layout, 32, 64)
    for before, a, b in zip(caches, native, plain, strict=True):
        assert torch.equal(a, b)
        for at in (of_keys, of_values + 32 * 64):
            old, new = (c.flatten(2)[:, :, at].transpose(1, 2).flatten(0, 1) for c in (before, a))
            kept = [slot for slot in range(160) if slot not in destinations]
            assert torch.equal(new[destinations], old[sources])
            assert torch.equal(new[kept], old[kept])


def test_moving_nothing_is_fine() -> None:
    cache = torch.randn(1, 1, 32, 64)
    before = cache.clone()
    CacheRows([cache]).move([], [])
    assert torch.equal(cache, before)
