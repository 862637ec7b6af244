"""Drafting on vLLM's V2 runner: the augmenting block over what was just emitted, then a tree per request.

All shapes follow from what the host knows, so nothing waits for the device. In steps that only decode, both parts are
CUDA graphs; a mixed step runs the block kernel by kernel.

Legend: R requests of the batch, H rows of the head, N nodes of the largest tree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from clover_vllm.engine.drafting.proposer import HeadDrafter
from clover_vllm.engine.models.clover2 import Clover2TreeHead
from clover_vllm.engine.models.head import joined
from clover_vllm.engine.options import CloverOptions
from clover_vllm.engine.v2.graphs import DraftGraphs
from clover_vllm.engine.v2.layout import HeadRows, ScoredSlots, head_lengths
from clover_vllm.engine.v2.scheduler import is_sized
from clover_vllm.engine.v2.trees import NO_SLOT, SlotTrees
from clover_vllm.tree import TreeBatch
from clover_vllm.tree.growth import grow_best_first_on_device, grow_fixed_on_device
from clover_vllm.tree.sizes import ladder_to


class Clover2Speculator(DraftModelSpeculator):
    """Takes vLLM's care of a draft model's layers and cache; drafts trees."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.options: CloverOptions = self.speculative_config.clover
        nodes = self.num_speculative_steps
        self.ladder = ladder_to(nodes) if is_sized(vllm_config) else (nodes,)
        self.shape = self.options.fixed_shape(nodes)
        self.deepest = self.options.rounds(nodes) if self.shape is None else self.shape.max_depth
        self.trees: SlotTrees  # set by the runner
        self.scored: ScoredSlots | None = None  # of the step under way; set by the runner
        self.rows = HeadRows.make(self.input_buffers, self.idx_mapping)
        self._hidden: torch.Tensor  # [most rows of a step, width], what the block reads
        self._roots = torch.zeros(self.max_num_reqs, self.hidden_size, dtype=self.dtype, device=device)
        self._block_graphs: DraftGraphs
        self._growth_graphs: DraftGraphs

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        """Load the head and share the target's lm_head.

        Raises:
            UserError: the checkpoint or the target does not fit.
        """
        del target_attn_layer_names
        head = get_model(vllm_config=self.vllm_config, model_config=self.draft_model_config)
        assert isinstance(head, Clover2TreeHead)
        head.bind_target(target_model)
        self._hidden = torch.zeros(self.max_num_tokens, head.width, dtype=self.dtype, device=self.device)
        return head

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Graphs of the block, if its attention allows, and of growth. Several ranks launch kernel by kernel."""
        is_on = cudagraph_mode != CUDAGraphMode.NONE and get_tensor_model_parallel_world_size() == 1
        most = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        with_attention = (
            is_on
            and cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
            and self.attn_cg_support.min_cg_support.value >= AttentionCGSupport.UNIFORM_BATCH.value
        )
        rows = [1 + min(size, self.deepest) for size in self.ladder]
        self._block_graphs = DraftGraphs(self.vllm_config, self.device, with_attention, rows, most)
        sizes = [1 + size for size in self.ladder if size]
        if len(sizes) == 1:
            most = self.max_num_reqs * sizes[0]  # growth attends nothing, so it knows no bound of vLLM's
        self._growth_graphs = DraftGraphs(self.vllm_config, self.device, is_on, sizes, most)

    def capture(self) -> None:
        """Capture all graphs; with the requests of padding alone, for which nothing is written."""
        self.rows.requests.fill_(NO_SLOT)
        self.rows.slots.fill_(PAD_SLOT_ID)
        self.rows.last.zero_()
        if self._block_graphs.needs_capture():
            self._block_graphs.capture(self._dummy_block, "Capturing CUDA graphs of the head's block")
        if self._growth_graphs.needs_capture():
            self._growth_graphs.capture(self._dummy_growth, "Capturing CUDA graphs of drafting")

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft a tree for each request of the batch.

        Args:
            input_batch: of the step.
            slot_mappings: by layer, int64 [rows of the step].
            aux_hidden_states: those that the head reads, each [rows, hidden size]; the last is the last layer's.
            num_sampled: int32 [R], tokens that each request emitted.
            next_prefill_tokens: int32 [1, request slots], the prompt's token behind the step's rows.
            dummy_run: nothing was computed; the head is run for compilation and for the measurement of memory.
            num_speculative_tokens: nodes per tree; 0 only writes the head's cache. None: N.

        Returns:
            int64 [R, N], input tokens of the trees' nodes.
        """
        del attn_metadata, last_hidden_states, num_rejected, last_sampled, args, kwargs
        assert aux_hidden_states is not None
        hidden, requests = joined(aux_hidden_states), input_batch.num_reqs
        if dummy_run:
            return self._run_idly(hidden, requests)
        assert self.scored is not None, "the runner scores first"
        lengths = head_lengths(input_batch, self.deepest)
        only_decodes = input_batch.num_tokens == int(input_batch.cu_num_logits_np[-1])
        even = only_decodes and lengths.min() == lengths.max()
        block = self._block_graphs.find(requests, int(lengths[0])) if even else None
        nodes = self.num_speculative_steps if num_speculative_tokens is None else num_speculative_tokens
        growth = self._growth_graphs.find(requests, 1 + nodes)
        padded = max(requests, *(graph.num_reqs or 0 for graph in (block, growth) if graph is not None), 0)
        starts = self.rows.lay_out(
            input_batch,
            self.scored,
            num_sampled,
            next_prefill_tokens[0],
            slot_mappings[next(iter(self.draft_attn_layer_names))],
            lengths,
            padded,
        )
        self.scored = None
        count = int(starts[requests])
        torch.index_select(hidden, 0, self.rows.source[:count], out=self._hidden[:count])
        metadata = self._metadata(input_batch, starts, block)
        if block is not None:
            self._block_graphs.run_fullgraph(block)
        else:
            self._run_block(requests, count, metadata)
        if growth is not None:
            self._growth_graphs.run_fullgraph(growth)
        elif nodes:
            self._run_growth(requests, nodes)
        return self.draft_tokens[:requests]

    def _run_block(self, requests: int, count: int, metadata: dict[str, Any] | None) -> None:
        """What the block makes of the laid out rows, for each request's last true one."""
        rows = self.rows
        slots = dict.fromkeys(self.draft_attn_layer_names, rows.slots[:count])
        with set_forward_context(metadata, self.vllm_config, num_tokens=count, slot_mapping=slots):
            embeds = self.model.embed(rows.next_tokens[:count])
            g = self.model(rows.positions[:count], self._hidden[:count], embeds)
        self._roots[:requests] = g[rows.last[:requests]]

    def _run_growth(self, requests: int, nodes: int) -> None:
        """From what the block has made to trees by slot."""
        with set_forward_context(None, self.vllm_config, num_tokens=requests):
            trees = self._agreed(self.grow(self._roots[:requests], nodes))
        self.trees.put(self.rows.requests[:requests], trees, self.draft_tokens[:requests])

    def _dummy_block(self, graph: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
        """See vLLM's `CreateForwardFn`."""
        del warmup
        requests, count = graph.num_reqs, graph.num_tokens
        assert requests is not None
        batch = InputBatch.make_dummy(requests, count, self.input_buffers, graph.uniform_token_count)
        metadata = self.model_state.prepare_attn(
            batch,
            CUDAGraphMode.NONE,
            self.block_tables.get_dummy_block_tables(requests),
            self._slots_by_group(count),
            self.attn_groups,
            self.kv_cache_config,
            for_capture=True,
        )
        return lambda _: self._run_block(requests, count, metadata)

    def _dummy_growth(self, graph: BatchExecutionDescriptor, warmup: bool) -> Callable[[CUDAGraphMode], None]:
        """See vLLM's `CreateForwardFn`."""
        del warmup
        requests, rows = graph.num_reqs, graph.uniform_token_count
        assert requests is not None
        assert rows is not None
        return lambda _: self._run_growth(requests, rows - 1)

    def grow(self, g: torch.Tensor, nodes: int) -> TreeBatch:
        """Trees of as many nodes from augmenting outputs [R, hidden size], in a forward context."""
        drafter = HeadDrafter(self.model, g)
        if self.shape is not None:
            return grow_fixed_on_device(drafter, self.shape)
        options = self.options
        return grow_best_first_on_device(
            drafter,
            nodes,
            options.rounds(nodes),
            options.width(nodes),
            options.candidates(nodes),
            options.cutoffs,
        )

    @staticmethod
    def _agreed(trees: TreeBatch) -> TreeBatch:
        """The first rank's trees: ranks must verify the very same, though their arithmetic may differ in a bit."""
        if get_tensor_model_parallel_world_size() == 1:
            return trees
        tokens, parents = get_tp_group().broadcast(torch.stack([trees.tokens, trees.parents]), src=0)
        return TreeBatch(tokens, parents, trees.log_probs)

    def _run_idly(self, hidden: torch.Tensor, requests: int) -> torch.Tensor:
        rows = len(hidden)
        ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        with set_forward_context(None, self.vllm_config, num_tokens=rows):
            g = self.model(ids, hidden, self.model.embed(ids))
            self.grow(
                g[: max(2, requests)], self.num_speculative_steps
            )  # of one row, the compiler would make a constant
        return self.draft_tokens[:requests]

    def _metadata(
        self, batch: InputBatch, starts: np.ndarray, graph: BatchExecutionDescriptor | None
    ) -> dict[str, Any] | None:
        """vLLM's, for the block's attention. Buffers of the builders that a graph reads are written here too."""
        requests = batch.num_reqs
        longest = int((batch.num_computed_tokens_np + batch.num_scheduled_tokens).max())
        self.draft_max_seq_len = min(longest, self.max_model_len)
        count = int(starts[requests])
        if graph is None:
            graph = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, num_tokens=count, num_reqs=None)
        return self._build_attn_metadata(
            requests,
            graph,
            starts,
            batch.seq_lens_cpu_upper_bound,
            step=0,
            slot_mappings=self._slots_by_group(graph.num_tokens),
        )

    def _slots_by_group(self, rows: int) -> torch.Tensor:
        """Slot mapping as vLLM wants it, int64 [groups of the cache, rows]."""
        return self.rows.slots[:rows].expand(len(self.kv_cache_config.kv_cache_groups), rows)
