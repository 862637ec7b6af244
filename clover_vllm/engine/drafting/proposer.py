"""Drafting: the augmenting block over what was just accepted, then a tree per request."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from clover_vllm.engine.models.clover2 import Clover2DraftModel
from clover_vllm.engine.options import CloverOptions
from clover_vllm.tree import Tree, grow_best_first, grow_fixed


@dataclass
class AcceptedRows:
    """Rows of a step that belong to the text now, request by request (filled by the runner)."""

    rows: torch.Tensor  # int64 [N], indices of the step's rows, in path order
    next_tokens: torch.Tensor  # int64 [N], the token behind each
    positions: torch.Tensor  # int64 [N]
    slots: torch.Tensor  # int64 [N], cache slots of those positions
    starts: list[int]  # [R + 1], first entry of each request
    seq_lens: list[int]  # [R], positions cached afterwards
    drafting: list[int]  # requests to draft for


class HeadDrafter:
    """`clover_vllm.tree.Drafter` on the vLLM head. Legend: R requests, W nodes, D hidden size."""

    def __init__(self, head: Clover2DraftModel, g: torch.Tensor) -> None:
        """g: [R, D], augmenting outputs at the roots' positions."""
        self._head = head
        self._g = g
        self._states = g[:, None]  # [R, slots, D]

    def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, candidates = self._head.first(self._g)
        return log_probs[:, :num_candidates], candidates[:, :num_candidates]

    def expand(
        self, parent_slots: torch.Tensor, tokens: torch.Tensor, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        requests, w = tokens.shape
        if requests == 1:
            parents = self._states[0, parent_slots[0]]
        else:
            index = parent_slots[..., None].expand(requests, w, self._states.shape[-1])
            parents = self._states.gather(1, index).flatten(0, 1)
        states, log_probs, candidates = self._head.expand(parents, tokens.flatten())
        assert candidates.shape[-1] >= num_candidates, "compiled for fewer candidates"
        self._states = torch.cat([self._states, states.view(requests, w, -1)], dim=1)
        return (
            log_probs.view(requests, w, -1)[..., :num_candidates],
            candidates.view(requests, w, -1)[..., :num_candidates],
        )


class Clover2Proposer(EagleProposer):
    """Takes vLLM's care of a draft model's layers and cache from EAGLE's proposer; drafts trees."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: object) -> None:
        super().__init__(vllm_config, device, runner)
        self.options: CloverOptions = vllm_config.speculative_config.clover
        self.shape = self.options.fixed_shape(self.num_speculative_tokens)

    def load_model(self, target_model: nn.Module) -> None:
        """Load the head and share the target's lm_head.

        Raises:
            UserError: the checkpoint or the target does not fit.
        """
        of_target = set(get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase))
        self.model = self._get_model()
        self._draft_attn_layer_names = (
            set(get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)) - of_target
        )
        assert isinstance(self.model, Clover2DraftModel)
        self.model.bind_target(target_model)

    @torch.inference_mode()
    def dummy_run(self, num_tokens: int, *args: object, **kwargs: object) -> None:
        """Run the head once, for compilation and memory profiling."""
        del args, kwargs
        tokens = min(num_tokens, self.max_num_tokens)
        hidden = self.hidden_states[:tokens]
        with set_forward_context(None, self.vllm_config, num_tokens=tokens):
            ids = self.input_ids[:tokens].long()
            g = self.model(self.positions[:tokens], hidden, self.model.embed(ids))
            rows = max(2, self.max_batch_size * self.options.level_width(self.num_speculative_tokens))
            self.model.first(g[:rows])
            self.model.expand(g[:rows], ids[:rows])  # of one row, the compiler would make a constant

    def draft(
        self, hidden: torch.Tensor, accepted: AcceptedRows, common: CommonAttentionMetadata, num_nodes: int
    ) -> list[Tree]:
        """Write the accepted rows into the head's cache and grow trees.

        Args:
            hidden: [rows of the step, D], the target's pre-norm hidden states.
            accepted: which of them are text now.
            common: vLLM's metadata of the step, for block tables.
            num_nodes: most nodes per tree; 0 only writes the cache.

        Returns:
            one tree per drafting request; none if only the cache is written.
        """
        with self._forward_context(accepted, common):
            embeds = self.model.embed(accepted.next_tokens)
            g = self.model(accepted.positions, hidden[accepted.rows], embeds)
            if not accepted.drafting or not num_nodes:
                return []
            last = [accepted.starts[r + 1] - 1 for r in accepted.drafting]
            chosen = g[last[0] : last[0] + 1] if len(last) == 1 else g[torch.tensor(last, device=g.device)]
            return self.grow(chosen, num_nodes)

    def grow(self, g: torch.Tensor, num_nodes: int) -> list[Tree]:
        """Trees of at most `num_nodes` nodes from augmenting outputs [R, D], in a forward context."""
        drafter = HeadDrafter(self.model, g)
        options = self.options
        if self.shape is None:
            return grow_best_first(
                drafter,
                num_nodes,
                options.rounds(num_nodes),
                options.width(num_nodes),
                options.candidates(num_nodes),
                options.cutoffs,
                fixed_levels=get_tensor_model_parallel_world_size() > 1,
            )
        return grow_fixed(drafter, self.shape)

    def _forward_context(
        self, accepted: AcceptedRows, common: CommonAttentionMetadata
    ) -> AbstractContextManager[None]:
        """vLLM's, for the augmenting block's attention and whatever its compiled modules ask for."""
        count = accepted.rows.shape[0]
        starts = torch.tensor(accepted.starts, dtype=torch.int32)
        seq_lens = torch.tensor(accepted.seq_lens, dtype=torch.int32)
        metadata = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(self.device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=common.num_reqs,
            num_actual_tokens=count,
            max_query_len=max(b - a for a, b in pairwise(accepted.starts)),
            max_seq_len=max(accepted.seq_lens),
            block_table_tensor=common.block_table_tensor,
            slot_mapping=accepted.slots,
            causal=True,
        )
        _, by_layer = self.build_per_group_and_layer_attn_metadata(metadata)
        context: AbstractContextManager[None] = set_forward_context(
            by_layer,
            self.vllm_config,
            num_tokens=count,
            slot_mapping=self._get_slot_mapping(count, accepted.slots),
        )
        return context


def accepted_rows(
    kept: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    first_rows: Sequence[int],
    computed: Sequence[int],
    slots: torch.Tensor,
    drafting: list[int],
    vocab_size: int,
) -> AcceptedRows:
    """Lay out what the head reads.

    Args:
        kept: per request, the step's rows that are text now.
        tokens: per request, the token behind each of them.
        first_rows: per request, its first row in the step; the slots from there on are its next ones.
        computed: per request, positions cached before the step.
        slots: int64, cache slot of each row of the step.
        drafting: requests to draft for.
        vocab_size: placeholders of multimodal prompts and of embeddings lie outside and become 0.
    """
    counts = [len(rows) for rows in kept]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    positions = [p for base, count in zip(computed, counts, strict=True) for p in range(base, base + count)]
    targets = [
        s for first, count in zip(first_rows, counts, strict=True) for s in range(first, first + count)
    ]
    device = slots.device
    return AcceptedRows(
        rows=torch.tensor([row for rows in kept for row in rows]).to(device),
        next_tokens=torch.tensor(
            [token if 0 <= token < vocab_size else 0 for own in tokens for token in own]
        ).to(device),
        positions=torch.tensor(positions).to(device),
        slots=slots[torch.tensor(targets).to(device)],
        starts=starts,
        seq_lens=[b + c for b, c in zip(computed, counts, strict=True)],
        drafting=drafting,
    )
