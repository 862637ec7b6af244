"""vLLM's V1 model runner, verifying trees. The seams are listed in `engine.seams`.

A request that verifies has rows in a step: its root, the last sampled token, then its nodes, at the
contiguous cache slots that vLLM gives them. We change the rows' rotary positions to base + depth, let
attention see paths only, sample along the path, move the accepted rows' keys and values together,
and draft anew. The scheduler needs no change: a prefix of a tree is a tree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from clover_vllm.base.tensors import tensor_of
from clover_vllm.base.timing import StepTimer
from clover_vllm.engine.drafting.pending import PendingDrafts
from clover_vllm.engine.drafting.proposer import Clover2Proposer
from clover_vllm.engine.drafting.ranks import agree, leads
from clover_vllm.engine.drafting.speculation import Speculation
from clover_vllm.engine.endings import ending_of
from clover_vllm.engine.hooks import replaced
from clover_vllm.engine.metrics import AcceptanceWatch, Counters
from clover_vllm.engine.models.head import joined
from clover_vllm.engine.scorer import TreeScorer
from clover_vllm.engine.support import check_step
from clover_vllm.engine.verification import TargetLayers
from clover_vllm.tree import Tree
from clover_vllm.tree.step import CurrentStep, Step

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import DraftTokenIds
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


class CloverRunner(GPUModelRunner):
    """The V1 runner with trees; a mixin for its subclasses."""

    speculative_config: Any  # vLLM's type has no fields of ours, and may be None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        check_step(vllm_config)
        self.current = CurrentStep()
        self.timer = StepTimer()
        self.drafter = Clover2Proposer(vllm_config, device, self)
        self.scorer = TreeScorer(self.sampler, self.current)
        self.rejection_sampler = self.scorer
        self.use_aux_hidden_state_outputs = True
        self.counters = self._open_counters()
        head = self.speculative_config.draft_model_config.hf_config
        self._watch = AcceptanceWatch(self.counters, head.first_acceptance)
        self._pending = PendingDrafts(self.counters.count_fallback)
        self.speculation = Speculation(self)
        self._layers: TargetLayers | None = None  # where trees may branch
        self._decoded_only = True  # in the latest step

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            holder.in_spec_mode = False  # the scorer samples as without speculation, row by row
        if self.drafter.options.tree != "chain" and self.kv_caches:
            self._layers = TargetLayers(self, self.current, self.timer)
        self.speculation.initialize()

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        with self.timer.measure("verify"):
            self.speculation.begin_step(scheduler_output)
            return super().execute_model(scheduler_output, *args, **kwargs)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> tuple[torch.Tensor, SpecDecodeMetadata | None, int]:
        # A recurrent state is read as after drafts, whether there were any or not. Other steps without drafts are prepared
        # as without speculation, so that vLLM's own sampler samples them.
        recurrent = self.model_config.is_hybrid or self.model_config.is_attention_free
        drafted = any(scheduler_output.scheduled_spec_decode_tokens.values())
        with nullcontext() if drafted or recurrent else replaced(self, "speculative_config", None):
            prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        with self.timer.measure("python"):
            step = self._step(scheduler_output, num_scheduled_tokens)
            self.current.begin(step)
            if step.has_branches:
                self._set_positions(step)
        return prepared

    def _step(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> Step:
        """The trees whose nodes were scheduled, and what scoring needs to know of the batch."""
        batch, rows = self.input_batch, num_scheduled_tokens.tolist()
        states, most = self.requests, self.max_model_len
        trees: list[Tree | None] = [None] * len(rows)
        for request_id, tokens in scheduler_output.scheduled_spec_decode_tokens.items():
            if tokens:
                r = batch.req_id_to_index[request_id]
                trees[r] = self._pending.take(request_id, tokens, rows[r])
        return Step(
            trees,
            rows,
            endings={r: ending_of(states[name], most) for r, name in enumerate(batch.req_ids[: len(rows)])},
            histories=batch.req_output_token_ids,
            discarded=frozenset(np.nonzero(self.discard_request_mask.np[: len(rows)])[0].tolist()),
            with_logprobs=frozenset(batch.req_id_to_index[name] for name in batch.num_logprobs),
        )

    def _set_positions(self, step: Step) -> None:
        """Rotary position of a node: its root's plus its depth. Cache slots stay as they are."""
        rows: list[int] = []
        shifts: list[int] = []  # against the positions of a chain
        for root, tree in zip(step.root_rows, step.trees, strict=True):
            if tree is not None:
                rows += range(root + 1, root + 1 + len(tree))
                shifts += [depth - place for place, depth in enumerate(tree.depths, 1)]
        moved, by = tensor_of([rows, shifts], self.device)
        self.positions.index_add_(0, moved, by)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        if self.current.running:
            self._end_step(self.current.value)
        return output

    def _end_step(self, step: Step) -> None:
        self._decoded_only = step.decodes_only
        seconds = self.timer.finish_step(step.decodes_only)
        with self.timer.measure("python"):  # of the next step, as the seconds of this one are being counted
            batch = self.input_batch
            greedy = [request in batch.greedy_reqs for request in batch.req_ids] if step.has_drafts else []
            self.counters.count_step(step, greedy, seconds)
            self._watch.look()
            self.current.end()

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> Any:
        with self.timer.measure("sample"), self._without_discarded_generators():
            output = super()._sample(logits, spec_decode_metadata)
        if spec_decode_metadata is None and self.current.running:  # vLLM sampled the roots itself
            self.current.value.accepted = [[] for _ in self.current.value.trees]
        if self._layers is not None:
            with self.timer.measure("move"):
                slots = self.input_batch.block_table[0].slot_mapping.gpu
                self._layers.move_accepted(self.current, slots)
        return output

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        # vLLM gives up drafting for the whole batch when one request nears max_model_len; here the
        # scheduler cuts that one request's tree.
        return common_attn_metadata is not None

    @contextmanager
    def _without_discarded_generators(self) -> Iterator[None]:
        """Hide the generators of prompts that go on, so that nothing is drawn from them and nothing rewound.

        vLLM draws for such a prompt too and rewinds by generator offsets, which CPU generators do not have:
        plain vLLM 0.32.0 ends there ("does not use offset").
        """
        generators = self.input_batch.generators
        discarded = self.discard_request_mask.np
        hidden = {r: generators.pop(r) for r in list(generators) if discarded[r]}
        try:
            yield
        finally:
            generators.update(hidden)

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_discarded_generators():
            return super()._bookkeeping_sync(*args, **kwargs)

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: torch.Tensor | list[list[int]],
        sampling_metadata: SamplingMetadata,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        spec_decode_metadata: SpecDecodeMetadata | None,
        common_attn_metadata: CommonAttentionMetadata,
        slot_mappings: dict[str, torch.Tensor] | list[dict[str, torch.Tensor]] | None,
    ) -> list[list[int]]:
        del scheduler_output, sampling_metadata, hidden_states, sample_hidden_states
        del spec_decode_metadata, slot_mappings
        assert isinstance(sampled_token_ids, list)
        assert aux_hidden_states is not None
        self.speculation.scored(
            self.current.value, sampled_token_ids, joined(aux_hidden_states), common_attn_metadata
        )
        return [[] for _ in sampled_token_ids]

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Drafts only now, as the engine asks for drafts: the tokens of the step are on their way already."""
        if self.speculation.is_due:
            with self.timer.measure("draft"):
                trees, requests = self.speculation.draft()
            with self.timer.measure("python"):
                self._draft_token_ids = self._remember(trees, requests)
            self.counters.count_seconds(self.timer.finish_step(self._decoded_only))
        return super().take_draft_token_ids()

    def _remember(self, trees: dict[int, Tree], requests: int) -> list[list[int]]:
        """Keep the drafts until they are verified, and tell the scheduler their tokens, by request."""
        # Ranks must verify the very same trees, though their arithmetic may differ in a bit.
        trees = agree(trees)
        names = self.input_batch.req_ids
        made = {names[r]: self._usable(names[r], tree) for r, tree in trees.items()}
        made = {name: tree for name, tree in made.items() if len(tree)}
        self._pending.replace(made, set(names), self.requests)
        return [list(made[name].tokens) if name in made else [] for name in names[:requests]]

    def _usable(self, request_id: str, drafted: Tree) -> Tree:
        """What of a tree a request can verify."""
        if not len(drafted):
            self.counters.count_fallback("non_finite_draft")
        params = self.requests[request_id].sampling_params
        if params is None or params.structured_outputs is None:
            return drafted
        if not drafted.is_chain:  # the grammar follows drafts one after the other
            self.counters.count_fallback("structured_output")
        return drafted.likeliest_chain()

    def _open_counters(self) -> Counters:
        """One rank counts for all, in files that the front end reads."""
        counters = Counters(self.num_spec_tokens)
        if leads():
            engine = str(self.parallel_config.data_parallel_index)
            labels = {"model_name": str(self.model_config.served_model_name), "engine": engine}
            counters.export(self.speculative_config.counters, labels)
        return counters


class CloverCPUModelRunner(CloverRunner, CPUModelRunner):
    """For vLLM's CPU build."""
