"""vLLM's V1 model runner, verifying trees. The seams are listed in `engine.hooks`.

A request that verifies has rows in a step: its root, the last sampled token, then its nodes, at the
contiguous cache slots that vLLM gives them. We change the rows' rotary positions to base + depth, let
attention see paths only, sample along the path, move the accepted rows' keys and values together,
and draft anew. The scheduler needs no change: a prefix of a tree is a tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.utils import check_sequence_repetition
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from clover_vllm.attention.cpu.cache_rows import CacheRows
from clover_vllm.base.errors import UserError
from clover_vllm.base.timing import StepTimer
from clover_vllm.engine.backends.cpu import TreeCPUAttentionImpl, TreeCPUAttentionMetadataBuilder
from clover_vllm.engine.drafting.proposer import Clover2Proposer, accepted_rows
from clover_vllm.engine.metrics import AcceptanceWatch, Counters
from clover_vllm.engine.scorer import Batch, TreeScorer
from clover_vllm.tree import DraftTrees
from clover_vllm.tree.step import Ending, RequestTree, StepTrees

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


class CloverRunner(GPUModelRunner):
    """The V1 runner with trees; a mixin for its subclasses."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        budget = self.scheduler_config.max_num_batched_tokens
        if self.speculative_config.disable_eagle_block_drop and budget <= self.num_spec_tokens:
            # vLLM's scheduler would wait for ever to admit a request with one token left to compute.
            raise UserError(
                f"disable_eagle_block_drop needs --max-num-batched-tokens of {self.num_spec_tokens + 1} or more "
                f"with {self.num_spec_tokens} speculative tokens; it is {budget}."
            )
        self.drafter = Clover2Proposer(vllm_config, device, self)
        self.scorer = TreeScorer(self.sampler)
        self.rejection_sampler = self.scorer
        self.use_aux_hidden_state_outputs = True
        self.timer = StepTimer()
        self.counters = self._open_counters()
        head = self.speculative_config.draft_model_config.hf_config
        self._watch = AcceptanceWatch(self.counters, head.first_acceptance)
        self._drafts: dict[str, RequestTree] = {}  # by request, until they are scheduled
        self._cache_rows: CacheRows | None = None
        self._builders: list[TreeCPUAttentionMetadataBuilder] = []
        self._branching = self.drafter.options.tree != "chain"

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            holder.in_spec_mode = False  # the scorer samples as without speculation, row by row
        if self._branching and self.kv_caches:
            self._prepare_trees()

    def _prepare_trees(self) -> None:
        """Find the target's layers, and refuse what would not be verified correctly.

        Raises:
            UserError: trees are not supported for this target on this platform.
        """
        if len(self.kv_cache_config.kv_cache_groups) != 1 or self.uses_mrope:
            raise UserError(
                "Clover-2 cannot verify trees for targets with several kinds of attention or with "
                'M-RoPE yet; set the speculative option "tree" to "chain".'
            )
        if self.vllm_config.kv_transfer_config is not None:
            raise UserError(
                "Clover-2 cannot verify trees with a KV connector yet, which may save rows before they are "
                'moved into place; set the speculative option "tree" to "chain".'
            )
        layers = self.compilation_config.static_forward_context
        names = [
            name
            for group in self._attn_group_iterator()
            for name in group.layer_names
            if name not in self.drafter._draft_attn_layer_names
        ]
        builders = [group.get_metadata_builder() for group in self._attn_group_iterator()]
        for builder in builders:
            if not isinstance(builder, TreeCPUAttentionMetadataBuilder):
                raise UserError(
                    "Clover-2 verifies trees only with vLLM's CPU attention yet; set the speculative "
                    'option "tree" to "chain".'
                )
            builder.prepare_trees()
            self._builders.append(builder)
        for group in self.drafter.draft_attn_groups:  # one layout for all layers; these attend without trees
            group.get_metadata_builder().prepare_trees()
        for name in names:
            impl = layers[name].impl
            assert isinstance(impl, TreeCPUAttentionImpl), f"{name} has another attention implementation"
            impl.check_trees()
        self._cache_rows = CacheRows([layers[name].kv_cache for name in names])

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        with self.timer.measure("verify"):
            return super().execute_model(*args, **kwargs)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> tuple[torch.Tensor, SpecDecodeMetadata | None, int]:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        with self.timer.measure("python"):
            step = self._match_drafts(scheduler_output, num_scheduled_tokens)
            self.scorer.step = step
            self.scorer.batch = Batch(
                self.input_batch.req_output_token_ids,
                np.nonzero(self.discard_request_mask.np[: len(step.rows)])[0].tolist(),
            )
            for builder in self._builders:
                builder.step, builder.timer = step, self.timer
            if step.has_branches:
                self._set_positions(step)
        return prepared

    def _match_drafts(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> StepTrees:
        """The trees whose nodes were scheduled; the scheduler may have cut them short."""
        rows = num_scheduled_tokens.tolist()
        first_rows, row = [], 0
        for count in rows:
            first_rows.append(row)
            row += count
        trees: list[RequestTree | None] = [None] * len(rows)
        endings: dict[int, Ending] = {}
        for request_id, tokens in scheduler_output.scheduled_spec_decode_tokens.items():
            if not tokens:
                continue
            r = self.input_batch.req_id_to_index[request_id]
            endings[r] = self._ending(request_id)
            drafted = self._drafts.get(request_id)
            count = len(tokens)
            if drafted is not None and drafted.tokens[:count] == tokens and rows[r] == count + 1:
                trees[r] = drafted.prefix(count)
            else:  # any reading of the rows is exact; a chain needs no masks
                # The scheduler pads some admissions with -1, which no token equals.
                self.counters.count_fallback("placeholder_draft" if tokens[0] < 0 else "unknown_draft")
                trees[r] = RequestTree.chain(list(tokens))
        return StepTrees(trees, rows, first_rows, endings)

    def _ending(self, request_id: str) -> Ending:
        state = self.requests[request_id]
        remaining = self.max_model_len - state.num_tokens
        params = state.sampling_params
        if params is None:
            return Ending(remaining=remaining)
        if params.max_tokens is not None:
            remaining = min(remaining, params.max_tokens - len(state.output_token_ids))
        stops = frozenset(params.stop_token_ids or ())
        if params.eos_token_id is not None:
            stops |= {params.eos_token_id}
        return Ending(stops, remaining, repetition(params, state.output_token_ids))

    def _set_positions(self, step: StepTrees) -> None:
        """Rotary position of a node: its root's plus its depth. Cache slots stay as they are."""
        rows: list[int] = []
        shifts: list[int] = []
        for r, tree in enumerate(step.trees):
            if tree is None or tree.is_chain:
                continue
            root = step.root_row(r)
            for node, depth in enumerate(tree.depths):
                if depth != node + 1:
                    rows.append(root + node + 1)
                    shifts.append(depth - node - 1)
        self.positions[torch.tensor(rows, device=self.device)] += torch.tensor(shifts, device=self.device)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        step = self.scorer.step
        seconds = self.timer.finish_step(step is not None and step.decodes_only)
        with self.timer.measure("python"):  # of the next step, as the seconds of this one are being counted
            if step is not None:
                batch = self.input_batch
                greedy = [request in batch.greedy_reqs for request in batch.req_ids]
                self.counters.count_step(step, greedy, seconds)
                self._watch.look()
        return output

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None) -> Any:
        with self.timer.measure("sample"):
            output = super()._sample(logits, spec_decode_metadata)
        with self.timer.measure("move"):
            self._move_accepted()
        return output

    def _move_accepted(self) -> None:
        """Bring the accepted rows' keys and values right behind their roots."""
        step = self.scorer.step
        if step is None or self._cache_rows is None or not step.has_branches:
            return
        sources, destinations = step.moves()
        if sources:
            slots = self.input_batch.block_table[0].slot_mapping.gpu
            self._cache_rows.move(
                slots[torch.tensor(sources)].tolist(), slots[torch.tensor(destinations)].tolist()
            )

    def _input_fits_in_drafter(self, common_attn_metadata: CommonAttentionMetadata | None) -> bool:
        # vLLM gives up drafting for the whole batch when one request nears max_model_len; here the
        # scheduler cuts that one request's tree.
        return common_attn_metadata is not None

    @contextmanager
    def _without_discarded_generators(self) -> Iterator[None]:
        """Hide generators that nothing was drawn from, lest vLLM rewind them.

        The scorer does not draw for a prompt that goes on. vLLM rewinds by generator offsets, which
        CPU generators do not have: plain vLLM 0.32.0 ends there ("does not use offset").
        """
        generators = self.input_batch.generators
        hidden = {}
        for r in np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist():
            if r in generators:
                hidden[r] = generators.pop(r)
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
        del (
            scheduler_output,
            sampling_metadata,
            hidden_states,
            sample_hidden_states,
            spec_decode_metadata,
            slot_mappings,
        )
        assert isinstance(sampled_token_ids, list)
        assert aux_hidden_states is not None
        step = self.scorer.step
        assert step is not None
        with self.timer.measure("python"):
            accepted = self._accepted_rows(step, sampled_token_ids, common_attn_metadata)
        with self.timer.measure("draft"):
            trees = self.drafter.draft(
                aux_hidden_states[0], accepted, common_attn_metadata, self.num_spec_tokens
            )
        with self.timer.measure("python"):
            return self._remember(trees, accepted.drafting, len(step.rows))

    def _accepted_rows(
        self, step: StepTrees, sampled: list[list[int]], common: CommonAttentionMetadata
    ) -> Any:
        batch = self.input_batch
        kept: list[list[int]] = []
        tokens: list[list[int]] = []
        drafting: list[int] = []
        input_ids = self.input_ids.cpu
        computed = batch.num_computed_tokens_cpu[: len(step.rows)].tolist()
        for r, first in enumerate(step.first_rows):
            own = sampled[r]
            root = step.root_row(r)
            before = list(range(first, root))  # a prompt chunk's rows; none for a decoding request
            if own:
                nodes = step.accepted[r]
                kept.append([*before, root, *(root + 1 + node for node in nodes)])
                tokens.append([*input_ids[first + 1 : root + 1].tolist(), *own])
                drafting.append(r)
            else:
                following = self._token_at(batch.req_ids[r], computed[r] + step.rows[r])
                kept.append([*before, root])
                tokens.append([*input_ids[first + 1 : root + 1].tolist(), following])
        vocab = self.drafter.model.config.vocab_size
        return accepted_rows(kept, tokens, step.first_rows, computed, common.slot_mapping, drafting, vocab)

    def _token_at(self, request_id: str, position: int) -> int:
        """A request's token, or 0 where its prompt is given as embeddings: drafts there are poor then."""
        try:
            return self.requests[request_id].get_token_id(position)
        except ValueError:
            return 0

    def _remember(self, trees: DraftTrees | None, drafting: list[int], requests: int) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in range(requests)]
        # A running request that this step had no budget for keeps its drafts, here as in the scheduler.
        done = set(self.input_batch.req_ids)
        self._drafts = {k: v for k, v in self._drafts.items() if k in self.requests and k not in done}
        if trees is None:
            return drafts
        made = self._host_trees(trees)
        if self.parallel_config.tensor_parallel_size > 1:
            # Ranks must verify the very same trees, though their arithmetic may differ in a bit.
            made = get_tp_group().broadcast_object(made, src=0)
        for r, drafted in zip(drafting, made, strict=True):
            request_id = self.input_batch.req_ids[r]
            params = self.requests[request_id].sampling_params
            if params is not None and params.structured_outputs is not None:
                # The grammar follows drafts one after the other.
                if not drafted.is_chain:
                    self.counters.count_fallback("structured_output")
                drafted = drafted.likeliest_chain()
            if drafted.tokens:
                self._drafts[request_id] = drafted
                drafts[r] = drafted.tokens
        return drafts

    def _host_trees(self, trees: DraftTrees) -> list[RequestTree]:
        """The trees of the drafting requests as records on the host."""
        made = RequestTree.from_batch(trees)
        for drafted in made:
            if not drafted.tokens:
                self.counters.count_fallback("non_finite_draft")
        return made

    def _open_counters(self) -> Counters:
        """One rank counts for all, in files that the front end reads."""
        counters = Counters(self.num_spec_tokens)
        if get_tp_group().is_first_rank:
            engine = str(self.parallel_config.data_parallel_index)
            labels = {"model_name": str(self.model_config.served_model_name), "engine": engine}
            counters.export(self.speculative_config.counters, labels)
        return counters


class CloverCPUModelRunner(CloverRunner, CPUModelRunner):
    """For vLLM's CPU build."""


def repetition(params: SamplingParams, output: list[int]) -> Callable[[Sequence[int]], bool] | None:
    """Tells from a step's tokens, which follow `output`, whether repetition detection ends the request."""
    wanted = params.repetition_detection
    if wanted is None:
        return None
    tail = output[-max(1, wanted.max_pattern_size * wanted.min_count) :]
    missing = params.min_tokens - len(output)

    def repeats(emitted: Sequence[int]) -> bool:
        return len(emitted) >= missing and check_sequence_repetition([*tail, *emitted], wanted)

    return repeats
