"""The target's layers are found anew at each KV cache initialisation, and refused in a sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from small import one_sentence
from vllm.v1.attention.backend import AttentionType

from clover_vllm.base.errors import UserError
from clover_vllm.base.timing import StepTimer
from clover_vllm.engine.backends.cpu import TreeCPUAttentionImpl, TreeCPUAttentionMetadataBuilder
from clover_vllm.engine.runner import CloverRunner
from clover_vllm.engine.verification import TargetLayers
from clover_vllm.tree import Tree
from clover_vllm.tree.step import CurrentStep, Step


def layer(shape: tuple[int, ...]) -> SimpleNamespace:
    impl = object.__new__(TreeCPUAttentionImpl)
    impl.__dict__.update(
        alibi_slopes=None,
        logits_soft_cap=0,
        sinks=None,
        sliding_window=-1,
        kv_sharing_target_layer_name=None,
        attn_type=AttentionType.DECODER,
    )
    return SimpleNamespace(impl=impl, kv_cache=torch.zeros(shape))


def builder() -> TreeCPUAttentionMetadataBuilder:
    made = object.__new__(TreeCPUAttentionMetadataBuilder)
    made.__dict__.update(isa="vec", kv_cache_dtype="auto", dtype=torch.float32, layer_names=[])
    made.current = CurrentStep()
    return made


def runner(*shapes: tuple[int, ...]) -> tuple[CloverRunner, TreeCPUAttentionMetadataBuilder]:
    """A runner whose layers have caches of these shapes, and the builder of their metadata."""
    own = builder()
    layers = {f"layer {i}": layer(shape) for i, shape in enumerate(shapes)}
    group = SimpleNamespace(layer_names=list(layers), get_metadata_builder=lambda: own)
    made: Any = SimpleNamespace(
        kv_cache_config=SimpleNamespace(kv_cache_groups=[group]),
        uses_mrope=False,
        vllm_config=SimpleNamespace(kv_transfer_config=None),
        drafter=SimpleNamespace(draft_attn_groups=[], _draft_attn_layer_names=set()),
        compilation_config=SimpleNamespace(static_forward_context=layers),
        _attn_group_iterator=lambda: iter([group]),
    )
    return cast(CloverRunner, made), own


def test_layers_whose_caches_differ_in_shape_are_refused_in_a_sentence() -> None:
    made, _ = runner((4, 2, 32, 64), (4, 1, 32, 64))
    with pytest.raises(UserError, match="differ in shape") as caught:
        TargetLayers(made, CurrentStep(), StepTimer())
    one_sentence(caught.value)


def test_a_second_initialisation_has_builders_of_its_own() -> None:
    current, timer = CurrentStep(), StepTimer()
    shape = (4, 2, 32, 64)
    first, _ = runner(shape)
    TargetLayers(first, current, timer)
    second, fresh = runner(shape, shape)
    layers = TargetLayers(second, current, timer)
    assert fresh.current is current
    assert fresh.timer is timer

    caches = [found.kv_cache for found in second.compilation_config.static_forward_context.values()]
    old = next(iter(first.compilation_config.static_forward_context.values())).kv_cache
    for cache in (*caches, old):
        cache.normal_()
    step = Step.of_trees([Tree([5, 6], [-1, -1])])
    step.accepted = [[1]]
    before = old.clone()
    changed = [cache.clone() for cache in caches]
    current.begin(step)
    layers.move_accepted(current, torch.tensor([32, 33, 34]))
    assert all(not torch.equal(cache, copy) for cache, copy in zip(caches, changed, strict=True))
    assert torch.equal(old, before)


def test_nothing_moves_outside_of_a_step() -> None:
    made, _ = runner((4, 2, 32, 64))
    TargetLayers(made, CurrentStep(), StepTimer()).move_accepted(CurrentStep(), torch.tensor([0]))
