"""Drafting: the augmenting block over what was just accepted, then a tree per request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.spec_decode.eagle import EagleProposer

from clover_vllm.base.tensors import tensor_of
from clover_vllm.engine.drafting.backlog import AcceptedRows
from clover_vllm.engine.drafting.ranks import LeadingLevels, follow
from clover_vllm.engine.drafting.sizing import MOST_LEVELS, Sizer
from clover_vllm.engine.models.head import TreeHead
from clover_vllm.engine.options import ADAPTIVE_WIDTH, CloverOptions
from clover_vllm.tree import Tree, grow_best_first, grow_fixed
from clover_vllm.tree.budget import Floats, Ints
from clover_vllm.tree.forest import Forest, Prices


class HeadDrafter:
    """`clover_vllm.tree.Drafter` on the vLLM head. Legend: R requests, W nodes, D hidden size, S numbers of a state."""

    def __init__(self, head: TreeHead, g: torch.Tensor) -> None:
        """g: [R, D], what the head made of the roots' positions."""
        self._head = head
        self._roots = head.root_states(g)
        self._states = self._roots[:, None]  # [R, slots, S]

    def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, candidates = self._head.first(self._roots)
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


class HeadLevels:
    """`clover_vllm.tree.forest.LevelDrafter` on the vLLM head, timed."""

    def __init__(self, head: TreeHead, g: torch.Tensor, learn: Callable[[str, int, float], None]) -> None:
        """
        Args:
            head: of the engine.
            g: [R, D], what the head made of the roots' positions.
            learn: told the part, its rows and its milliseconds.
        """
        self._head, self._states, self._learn = head, g, learn

    def first(self) -> tuple[Floats, Ints]:
        begun = time.perf_counter()
        self._states = self._head.root_states(self._states)
        found = _on_host(*self._head.first(self._states))
        self._learn("first", len(found[0]), 1e3 * (time.perf_counter() - begun))
        return found

    def expand(self, parents: Ints, tokens: Ints) -> tuple[Floats, Ints]:
        begun = time.perf_counter()
        device = self._states.device
        above = self._states[torch.from_numpy(parents).to(device)]
        states, *children = self._head.expand(above, torch.from_numpy(tokens).to(device))
        self._states = torch.cat((self._states, states))
        found = _on_host(*children)
        self._learn("level", len(tokens), 1e3 * (time.perf_counter() - begun))
        return found


def _on_host(log_probs: torch.Tensor, tokens: torch.Tensor) -> tuple[Floats, Ints]:
    return log_probs.detach().to("cpu", torch.float64).numpy(), tokens.to("cpu", torch.int64).numpy()


class Clover2Proposer(EagleProposer):
    """Takes vLLM's care of a draft model's layers and cache from EAGLE's proposer; drafts trees."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: object) -> None:
        super().__init__(vllm_config, device, runner)
        self.options: CloverOptions = vllm_config.speculative_config.clover
        self.shape = self.options.fixed_shape(self.num_speculative_tokens)
        self.sizer: Sizer | None = None  # set where trees are sized by what they cost and earn
        self.idle = False  # while only the target is timed

    @property
    def is_adaptive(self) -> bool:
        """Whether trees are sized by what they cost and earn."""
        return self.options.tree == "adaptive"

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
        assert isinstance(self.model, TreeHead)
        self.model.bind_target(target_model)

    def initialize_attn_backend(
        self, kv_cache_config: KVCacheConfig, kernel_block_sizes: list[int] | None = None
    ) -> None:
        """As the base class, which expects attention layers; a head may have none.

        Then the target's group of the cache is its own: the runner hands on the metadata of that group alone.
        """
        if self._draft_attn_layer_names:
            super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        else:
            self.kv_cache_gid = 0

    @torch.inference_mode()
    def dummy_run(self, num_tokens: int, *args: object, **kwargs: object) -> None:
        """Run the head once, for compilation and memory profiling."""
        del args, kwargs
        if self.idle:
            return
        tokens = min(num_tokens, self.max_num_tokens)
        hidden = torch.zeros(tokens, self.model.width, dtype=self.dtype, device=self.device)
        with set_forward_context(None, self.vllm_config, num_tokens=tokens):
            ids = self.input_ids[:tokens].long()
            g = self.model(self.positions[:tokens], hidden, self.model.embed(ids))
            rows = max(2, self.max_batch_size * self.options.level_width(self.num_speculative_tokens))
            states = self.model.root_states(g[:rows])
            self.model.first(states)
            self.model.expand(states, ids[:rows])  # of one row, the compiler would make a constant

    def timed(self, part: str) -> Callable[[int], Callable[[], object]]:
        """Prepares runs of `augment`, `first` or `level` with some number of rows, to be timed."""
        size = self.vllm_config.model_config.get_hidden_size()

        def prepare(rows: int) -> Callable[[], object]:
            states = torch.zeros(rows, size, dtype=self.dtype, device=self.device)
            hidden = torch.zeros(rows, self.model.width, dtype=self.dtype, device=self.device)
            ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
            places = self.positions[:rows]
            roots = self.model.root_states(states) if part == "level" else states

            def run() -> object:
                with set_forward_context(None, self.vllm_config, num_tokens=rows):
                    if part == "augment":
                        return self.model(places, hidden, self.model.embed(ids))
                    if part == "first":
                        return self.model.first(self.model.root_states(states))
                    return self.model.expand(roots, ids)

            return run

        return prepare

    def draft(
        self, accepted: AcceptedRows, drafting: Sequence[int], common: CommonAttentionMetadata, num_nodes: int
    ) -> list[Tree]:
        """Write rows into the head's cache and grow trees of one size.

        Args:
            accepted: what the head reads.
            drafting: requests of the batch to draft for.
            common: vLLM's metadata of the step, for block tables.
            num_nodes: most nodes per tree; 0 only writes the cache.

        Returns:
            one tree per drafting request; none if only the cache is written.
        """
        with self._forward_context(accepted, common):
            g = self._augment(accepted)
            if not drafting or not num_nodes:
                return []
            return self.grow(self._roots(g, accepted, drafting), num_nodes)

    def grow_forest(
        self,
        accepted: AcceptedRows,
        asked: Sequence[int],
        places: Sequence[int],
        common: CommonAttentionMetadata,
        forest: Forest,
        prices: Prices,
    ) -> None:
        """Write rows into the head's cache and grow a batch's trees as far as it pays.

        Args:
            accepted: what the head reads.
            asked: requests of the batch to ask it for.
            places: of theirs in the forest, ascending.
            common: vLLM's metadata of the step, for block tables.
            forest: of the batch.
            prices: of nodes and levels.
        """
        assert self.sizer is not None
        learn = self.sizer.learn_pass
        with self._forward_context(accepted, common):
            begun = time.perf_counter()
            g = self._augment(accepted)
            learn("augment", len(accepted.positions), 1e3 * (time.perf_counter() - begun))
            prices.spent += self.sizer.costs.of_augmenting(len(accepted.positions))
            if not asked:
                return
            prices.spent += self.sizer.costs.of_first(len(asked))
            levels = LeadingLevels(HeadLevels(self.model, self._roots(g, accepted, asked), learn))
            most = self.options.draft_rounds or MOST_LEVELS
            forest.grow_head(levels, places, prices, self.sizer.following, most, ADAPTIVE_WIDTH)
            levels.end()

    def follow_forest(
        self, accepted: AcceptedRows, asked: Sequence[int], common: CommonAttentionMetadata
    ) -> None:
        """`grow_forest` of the other ranks: this one's share of what the first asks the head for."""
        with self._forward_context(accepted, common):
            g = self._augment(accepted)
            if asked:
                follow(HeadLevels(self.model, self._roots(g, accepted, asked), lambda *_: None))

    def _augment(self, accepted: AcceptedRows) -> torch.Tensor:
        embeds = self.model.embed(accepted.next_tokens)
        return self.model(accepted.positions, accepted.hidden, embeds)

    @staticmethod
    def _roots(g: torch.Tensor, accepted: AcceptedRows, drafting: Sequence[int]) -> torch.Tensor:
        """Augmenting outputs behind the last rows of some requests."""
        place = {r: i for i, r in enumerate(accepted.requests)}
        last = [accepted.starts[place[r] + 1] - 1 for r in drafting]
        return g[last[0] : last[0] + 1] if len(last) == 1 else g[tensor_of(last, g.device)]

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
        count = accepted.positions.shape[0]
        tables = common.block_table_tensor
        if accepted.requests != list(range(common.num_reqs)):
            tables = tables[tensor_of(accepted.requests, tables.device)]
        if any(accepted.skipped):
            skipped = tensor_of(accepted.skipped, tables.device)
            width = tables.shape[1] - min(accepted.skipped)
            blocks = skipped[:, None] + torch.arange(width, device=tables.device)
            tables = tables.gather(1, blocks.clamp(max=tables.shape[1] - 1))
        starts = tensor_of(accepted.starts, dtype=np.int32)
        seq_lens = tensor_of(accepted.seq_lens, dtype=np.int32)
        metadata = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(self.device),
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(accepted.requests),
            num_actual_tokens=count,
            max_query_len=max(b - a for a, b in pairwise(accepted.starts)),
            max_seq_len=max(accepted.seq_lens),
            block_table_tensor=tables,
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
