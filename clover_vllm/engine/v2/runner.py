"""vLLM's V2 model runner, verifying trees. The seams are listed in `engine.seams`.

A request that verifies has rows in a step: its root, the last sampled token, then its nodes, at the contiguous cache
slots that vLLM gives them. Trees are padded to one size, as vLLM's scheduler expects of drafts that it never sees.
Nothing here reads a device tensor: what was accepted, vLLM's output copy tells the host a step later.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from clover_vllm.attention.triton.cache_rows import CacheRows
from clover_vllm.attention.triton.counts import count_trees
from clover_vllm.attention.triton.tree_attention import SplitContexts, processors_of
from clover_vllm.engine.backends.gpu import StepRows, TreeAttentionImpl, TreeMetadataBuilder
from clover_vllm.engine.drafting.ranks import leads
from clover_vllm.engine.hooks import making_graphs, making_speculator
from clover_vllm.engine.metrics import AcceptanceWatch, Counters
from clover_vllm.engine.support import OTHER_ATTENTION, check_cache, check_shapes, check_step, refuse_trees
from clover_vllm.engine.v2.graphs import TargetGraphs
from clover_vllm.engine.v2.layout import ScoredSlots
from clover_vllm.engine.v2.scorer import DeviceScorer
from clover_vllm.engine.v2.speculator import Clover2Speculator
from clover_vllm.engine.v2.trees import SlotTrees

if TYPE_CHECKING:
    import numpy as np
    from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

logger = init_logger("vllm.clover")

BUILT_IN_PROCESSORS = 3
"""Logits processors that vLLM's V2 sampler always has, before those of users: biases, penalties, bad words."""


class CloverV2Runner(GPUModelRunner):
    """The V2 runner with trees; a mixin for its subclasses."""

    speculator: Clover2Speculator

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        with making_speculator(Clover2Speculator):
            super().__init__(vllm_config, device)
        check_step(vllm_config)
        if self.speculator.options.tree == "adaptive":
            sizes = ", ".join(map(str, self.speculator.ladder))
            logger.info("Clover-2 drafts trees of one size per step, of these numbers of nodes: %s.", sizes)
        self.use_aux_hidden_state_outputs = True
        self.trees = self.speculator.trees = SlotTrees(self.req_states)
        self._step: StepRows | None = None  # where trees may branch
        self._rows: CacheRows | None = None  # of the target's layers, where trees may branch
        self._slots: torch.Tensor | None = None  # int64, cache slots of the rows of the step under way
        self.counters = Counters(self.num_speculative_steps)
        if leads():
            engine = str(self.parallel_config.data_parallel_index)
            labels = {"model_name": str(self.model_config.served_model_name), "engine": engine}
            self.counters.export(self.speculative_config.counters, labels)
        head = self.speculative_config.draft_model_config.hf_config
        self._watch = AcceptanceWatch(self.counters, head.first_acceptance)
        self._counts = torch.zeros(len(self.counters.trees), dtype=torch.float64, device=self.device)
        self._counted: np.ndarray | None = None  # the same on the host, once the step's output is there

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        for processor in self.sampler.logits_processors[BUILT_IN_PROCESSORS:]:
            self.trees.follow(processor)
        self.rejection_sampler: DeviceScorer = DeviceScorer(
            self.sampler, self.speculative_config, self.device, self.trees
        )

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, is_profiling: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        ladder = self.speculator.ladder
        with making_graphs(partial(TargetGraphs, ladder)) if len(ladder) > 1 else nullcontext():
            super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        if self.speculator.options.tree != "chain":
            self._step = StepRows.make(self.max_num_tokens, self.num_speculative_steps, self.device)
            rows = self._find_layers(self._step)
            self._rows = None if is_profiling else rows  # vLLM frees that cache before it makes the real one

    def _find_layers(self, step: StepRows) -> CacheRows:
        """The target's attention layers, whose metadata are made to know the step.

        Raises:
            UserError: trees are not supported for this target on this platform.
        """
        check_cache(self.vllm_config, self.kv_cache_config)
        drafts = self.speculator.draft_attn_layer_names
        layers = self.compilation_config.static_forward_context
        caches: list[torch.Tensor] = []
        contexts: dict[int, SplitContexts] = {}  # by query heads
        for group in (group for groups in self.attn_groups for group in groups):
            builder = group.get_metadata_builder()
            if not isinstance(builder, TreeMetadataBuilder):
                raise refuse_trees(OTHER_ATTENTION)
            builder.step = step
            for name in group.layer_names:
                if name not in drafts:
                    impl, cache = layers[name].impl, layers[name].kv_cache
                    if not isinstance(impl, TreeAttentionImpl):
                        raise refuse_trees(OTHER_ATTENTION)
                    impl.check_trees(self.dtype)
                    if impl.num_heads not in contexts:
                        contexts[impl.num_heads] = SplitContexts(
                            self.max_num_reqs,
                            step.nodes + 1,
                            impl.num_heads,
                            cache.shape[1],
                            cache.shape[3] // 2,
                            self.dtype,
                            self.device,
                            processors_of(self.device),
                        )
                    impl.contexts = contexts[impl.num_heads]
                    caches.append(cache)
        check_shapes(caches)
        return CacheRows(caches)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            self.trees.add_request(self.req_states.req_id_to_index[request.req_id], request.sampling_params)

    def prepare_attn(self, input_batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """As the base class; then nodes get the positions that they would have in decoding, at their own slots."""
        prepared = super().prepare_attn(input_batch)
        verifies = input_batch.num_draft_tokens > 0
        if self._step is not None:
            self._step.verifies = verifies
            self._step.decodes_only = input_batch.num_tokens == int(input_batch.cu_num_logits_np[-1])
        if verifies:
            self.trees.lay_out(input_batch, self.req_states.prefill_len.gpu, self._step)
        self._slots = prepared[1][0] if self._rows is not None else None  # all layers are of one group
        return prepared

    def prepare_dummy_attn(
        self, input_batch: InputBatch, *args: Any, **kwargs: Any
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        self._slots = None
        if self._step is not None:
            self._step.verifies = False
        return super().prepare_dummy_attn(input_batch, *args, **kwargs)

    def sample(
        self,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """As the base class; then accepted rows of the cache move behind their roots."""
        made = super().sample(hidden_states, input_batch, grammar_output)
        sampled, num_sampled = made[0].sampled_token_ids, made[1]
        path = self.rejection_sampler.take_path() if input_batch.num_draft_tokens else None
        slots, self._slots = self._slots, None
        self.speculator.scored = ScoredSlots(sampled, path)
        self._counted = None if path is None else self._count(input_batch, path, num_sampled)
        if path is not None and self._rows is not None:
            assert slots is not None, "the step was not prepared"
            roots = input_batch.logits_indices[input_batch.cu_num_logits[:-1]]
            self._rows.move_accepted(slots, roots, path, num_sampled)
        return made

    def _count(self, batch: InputBatch, path: torch.Tensor, num_sampled: torch.Tensor) -> np.ndarray:
        """What trees were verified and accepted since the start. It is there when vLLM has waited for its own copy."""
        temperatures = self.sampler.sampling_states.temperature.gpu
        count_trees(
            self._counts,
            self.trees.kept,
            batch.idx_mapping,
            batch.cu_num_logits,
            path,
            num_sampled,
            temperatures,
        )
        return async_copy_to_np(self._counts)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As the base class, whose copy of the step's output is started behind that of the counts."""
        made = super().sample_tokens(*args, **kwargs)
        counted, self._counted = self._counted, None
        return made if counted is None else CountedOutput(made, partial(self._take, counted))

    def _take(self, counted: np.ndarray) -> None:
        self.counters.take(counted)
        self._watch.look()


class CountedOutput(AsyncModelRunnerOutput):
    """A step's output, with which the host learns what was counted."""

    def __init__(self, output: AsyncModelRunnerOutput, arrived: Callable[[], None]) -> None:
        """
        Args:
            output: vLLM's.
            arrived: called once it is on the host.
        """
        self._output = output
        self._arrived = arrived

    def get_output(self) -> ModelRunnerOutput:
        made = self._output.get_output()
        self._arrived()
        return made
