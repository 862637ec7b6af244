"""Drafting on vLLM's V2 runner: the augmenting block over what was just emitted, then a tree per request.

All shapes follow from what the host knows, so nothing waits for the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from clover_vllm.engine.drafting.proposer import HeadDrafter
from clover_vllm.engine.models.clover2 import Clover2DraftModel
from clover_vllm.engine.models.head import joined
from clover_vllm.engine.options import CloverOptions
from clover_vllm.engine.v2.layout import HeadRows, Scored, head_rows
from clover_vllm.engine.v2.trees import SlotTrees
from clover_vllm.tree import TreeBatch
from clover_vllm.tree.growth import grow_best_first_on_device, grow_fixed_on_device


class Clover2Speculator(DraftModelSpeculator):
    """Takes vLLM's care of a draft model's layers and cache; drafts trees."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.options: CloverOptions = self.speculative_config.clover
        nodes = self.num_speculative_steps
        self.shape = self.options.fixed_shape(nodes)
        self.deepest = self.options.rounds(nodes) if self.shape is None else self.shape.max_depth
        self.trees: SlotTrees  # set by the runner
        self.scored: Scored | None = None  # of the step under way; set by the runner

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        """Load the head and share the target's lm_head.

        Raises:
            UserError: the checkpoint or the target does not fit.
        """
        del target_attn_layer_names
        head = get_model(vllm_config=self.vllm_config, model_config=self.draft_model_config)
        assert isinstance(head, Clover2DraftModel)
        head.bind_target(target_model)
        return head

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """The head runs without CUDA graphs of its own."""

    def capture(self) -> None:
        """As `init_cudagraph_manager`."""

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

        Returns:
            int64 [R, N], input tokens of the trees' nodes.
        """
        del attn_metadata, last_hidden_states, num_rejected, last_sampled, args, kwargs
        assert aux_hidden_states is not None
        hidden = joined(aux_hidden_states)
        if dummy_run:
            return self._run_idly(hidden, input_batch.num_reqs)
        assert self.scored is not None, "the runner scores first"
        slots = slot_mappings[next(iter(self.draft_attn_layer_names))]
        rows = head_rows(input_batch, self.scored, num_sampled, next_prefill_tokens[0], slots, self.deepest)
        self.scored = None
        with self._forward_context(rows, input_batch):
            embeds = self.model.embed(rows.next_tokens)
            g = self.model(rows.positions, hidden[rows.source], embeds)
            trees = self._agreed(self.grow(g[rows.last]))
        return self.trees.put(input_batch.idx_mapping, input_batch.idx_mapping_np, trees)

    def grow(self, g: torch.Tensor) -> TreeBatch:
        """Trees of fixed shapes from augmenting outputs [R, hidden size], in a forward context."""
        drafter = HeadDrafter(self.model, g)
        if self.shape is not None:
            return grow_fixed_on_device(drafter, self.shape)
        options, nodes = self.options, self.num_speculative_steps
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
            self.grow(g[:requests])
        return self.draft_tokens[:requests]

    def _forward_context(self, rows: HeadRows, batch: InputBatch) -> AbstractContextManager[None]:
        """vLLM's, for the augmenting block's attention."""
        count, requests = len(rows.source), batch.num_reqs
        self.input_buffers.query_start_loc[: requests + 1].copy_(rows.starts)
        self.input_buffers.seq_lens[:requests].copy_(rows.seq_lens)
        self.input_buffers.positions[:count].copy_(rows.positions)
        metadata = self._build_attn_metadata(
            requests,
            BatchExecutionDescriptor(cg_mode=CUDAGraphMode.NONE, num_tokens=count, num_reqs=None),
            rows.starts_np,
            batch.seq_lens_cpu_upper_bound,
            step=0,
            slot_mappings=rows.slots[None],
        )
        context: AbstractContextManager[None] = set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=count,
            slot_mapping=dict.fromkeys(self.draft_attn_layer_names, rows.slots),
        )
        return context
