"""Tree verification in the target's attention: its layers, their metadata, their cached rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from clover_vllm.attention.cpu.cache_rows import CacheRows
from clover_vllm.base.tensors import tensor_of
from clover_vllm.base.timing import StepTimer
from clover_vllm.engine.backends.cpu import TreeCPUAttentionImpl, TreeCPUAttentionMetadataBuilder
from clover_vllm.engine.support import OTHER_ATTENTION, check_cache, check_shapes, refuse_trees
from clover_vllm.tree.step import CurrentStep

if TYPE_CHECKING:
    from clover_vllm.engine.runner import CloverRunner


class TargetLayers:
    """The target's attention layers of one KV cache initialisation."""

    def __init__(self, runner: CloverRunner, current: CurrentStep, timer: StepTimer) -> None:
        """Find the layers, and let their metadata know the step.

        Raises:
            UserError: trees are not supported for this target on this platform.
        """
        check_cache(runner.vllm_config, runner.kv_cache_config)
        groups = list(runner._attn_group_iterator())
        for group in groups:
            builder = group.get_metadata_builder()
            if not isinstance(builder, TreeCPUAttentionMetadataBuilder):
                raise refuse_trees(OTHER_ATTENTION)
            builder.check_trees()
            builder.current, builder.timer = current, timer
        drafts = runner.drafter._draft_attn_layer_names
        layers = runner.compilation_config.static_forward_context
        caches = [self._cache(layers[name]) for g in groups for name in g.layer_names if name not in drafts]
        check_shapes(caches)
        layouts = {layers[name].isa for g in groups for name in g.layer_names if name not in drafts}
        assert len(layouts) == 1, layouts  # vLLM chooses by dtype, block and head size
        self._rows = CacheRows(caches, layouts.pop())

    @staticmethod
    def _cache(layer: Any) -> torch.Tensor:
        if not isinstance(layer.impl, TreeCPUAttentionImpl):
            raise refuse_trees(OTHER_ATTENTION)
        layer.impl.check_trees()
        cache: torch.Tensor = layer.kv_cache
        return cache

    def move_accepted(self, current: CurrentStep, slots: torch.Tensor) -> None:
        """Bring the accepted rows' keys and values right behind their roots.

        Args:
            current: the step, scored.
            slots: int64, cache slot of each row of the step.
        """
        if not current.running or not current.value.has_branches:
            return
        sources, destinations = current.value.moves()
        if sources:
            self._rows.move(slots[tensor_of(sources)].tolist(), slots[tensor_of(destinations)].tolist())
