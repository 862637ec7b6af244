"""The target's layers are found anew at each KV cache initialisation, and refused in a sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import one_sentence
from vllm.v1.attention.backend import AttentionType
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from clover_vllm.base.errors import UserError
from clover_vllm.base.timing import StepTimer
from clover_vllm.engine.backends.cpu import TreeCPUAttentionImpl, TreeCPUAttentionMetadataBuilder
from clover_vllm.engine.runner import CloverRunner
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
    return SimpleNamespace(impl=impl, isa="vec", kv_cache=torch.zeros(shape))


def builder() -> TreeCPUAttentionMetadataBuilder:
    made = object.__new__(TreeCPUAttentionMetadataBuilder)
    made.__dict__.update(isa="vec", kv_cache_dtype="auto", dtype=torch.float32, layer_names=[])
    made.current = CurrentStep()
    return made


class VllmRunner(GPUModelRunner):
    """vLLM's runner, as far as the initialisation of its cache goes."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            kv_transfer_config=None, model_config=SimpleNamespace(uses_mrope=False)
        )
        self.compilation_config = SimpleNamespace(static_forward_context={})
        self.input_batch = SimpleNamespace(thinking_budget_state_holder=None)

    def initialize_kv_cache(self, kv_cache_config: Any) -> None:
        """Layers with caches of the given shapes, and one builder of their metadata, all new."""
        layers = {f"layer {i}": layer(shape) for i, shape in enumerate(kv_cache_config.shapes)}
        own = builder()
        group = SimpleNamespace(layer_names=list(layers), get_metadata_builder=lambda: own)
        self.attn_groups = [[group]]
        self.compilation_config.static_forward_context.update(layers)
        self.kv_caches = [found.kv_cache for found in layers.values()]
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[group])


class Runner(CloverRunner, VllmRunner):
    """Clover's runner over that one."""

    def __init__(self) -> None:
        VllmRunner.__init__(self)
        self.current, self.timer = CurrentStep(), StepTimer()
        drafter: Any = SimpleNamespace(
            draft_attn_groups=[], _draft_attn_layer_names=set(), options=SimpleNamespace(tree="adaptive")
        )
        speculation: Any = SimpleNamespace(initialize=lambda: None)
        self.drafter, self.speculation = drafter, speculation
        self._layers = None

    def initialize(self, *shapes: tuple[int, ...]) -> TreeCPUAttentionMetadataBuilder:
        """Initialise the cache with layers of these shapes; the builder of their metadata."""
        self.initialize_kv_cache(SimpleNamespace(shapes=shapes))
        (group,) = self._attn_group_iterator()
        made: TreeCPUAttentionMetadataBuilder = group.get_metadata_builder()
        return made


SHAPE = (4, 2, 32, 64)


def test_layers_whose_caches_differ_in_shape_are_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="differ in shape") as caught:
        Runner().initialize(SHAPE, (4, 1, 32, 64))
    one_sentence(caught.value)


def test_a_second_initialisation_finds_its_own_builders_and_caches() -> None:
    runner = Runner()
    first = runner.initialize(SHAPE)
    (old,) = runner.kv_caches
    second = runner.initialize(SHAPE, SHAPE)
    assert first is not second
    for found in (first, second):
        assert found.current is runner.current
        assert found.timer is runner.timer

    for cache in (*runner.kv_caches, old):
        cache.normal_()
    before, fresh = old.clone(), [cache.clone() for cache in runner.kv_caches]
    step = Step.of_trees([Tree([5, 6], [-1, -1])])
    step.accepted = [[1]]
    runner.current.begin(step)
    assert runner._layers is not None
    runner._layers.move_accepted(runner.current, torch.tensor([32, 33, 34]))
    assert all(not torch.equal(cache, copy) for cache, copy in zip(runner.kv_caches, fresh, strict=True))
    assert torch.equal(old, before)


def test_nothing_moves_outside_of_a_step() -> None:
    runner = Runner()
    runner.initialize(SHAPE)
    assert runner._layers is not None
    runner._layers.move_accepted(runner.current, torch.tensor([0]))
