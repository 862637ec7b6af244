"""Reference Clover head in plain PyTorch (arXiv 2405.00263).

What Clover-2 changed (arXiv 2408.00264, section 3), undone: the augmenting block reads the target's hidden states
alone, the token comes in behind it; each depth has a residual block of its own behind the attention decoder, as
Medusa's heads have, where Clover-2 projects state and token together; there is one augmenting layer; the loss is the
cross entropy of the text's tokens. Published Clover weights do not exist, so the attention decoder is taken in the
form that Clover-2's published code has inherited: gated by a cosine similarity per head, shared by all depths.

Legend: B sequences, T positions, D hidden size, N rows of any kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from clover_vllm.heads.base import DraftTables, NewHead, Prefix, TeacherForced
from clover_vllm.heads.clover1.config import Clover1Config
from clover_vllm.heads.clover2.model import ResAttentionBlock
from clover_vllm.heads.layers import DecoderLayer, KVCache, ResBlock, RMSNorm, Rotary
from clover_vllm.heads.saved import SavedHead

if TYPE_CHECKING:
    from clover_vllm.target.frozen import FrozenTarget


class Clover1DraftModel(SavedHead):
    """The Clover head. lm_head and embeddings are the target's.

    Inputs at position t are h_t, the target's last hidden state before its final norm, and the lm_head row of the
    token at t + 1. Depth 0 predicts the token at t + 2.
    """

    config: Clover1Config
    config_class = Clover1Config
    title = "Clover"

    def __init__(self, config: Clover1Config) -> None:
        super().__init__(config)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, eps)
        self.decoder = ResAttentionBlock(config)
        self.heads = nn.ModuleList(ResBlock(size) for _ in range(config.num_heads))
        self.head_norm = RMSNorm(size, eps)
        self.rotary = Rotary(config)

    def new_cache(self) -> list[KVCache]:
        """An empty key/value cache, one entry per augmenting layer."""
        return [KVCache() for _ in self.layers]

    def augment(self, hidden: torch.Tensor, cache: list[KVCache] | None = None) -> torch.Tensor:
        """The augmenting block: causal layers over the target's pre-norm hidden states alone.

        Args:
            hidden: [B, T, D].
            cache: from `new_cache`, when the positions continue an earlier call; grown in place.

        Returns:
            [B, T, D].
        """
        past = cache[0].length if cache else 0
        positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        cos, sin = self.rotary(positions)
        x = hidden * self.config.hidden_scale
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache[index] if cache else None)
        return self.norm(x)

    def advance(self, r: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """The regressive connection: the state of a node, from its parent's (the augmenting output, for the root).

        Args:
            r: [..., D].
            embeds: [..., D], unscaled lm_head rows of the tokens at those nodes.
        """
        return self.decoder(r, embeds * self.config.embed_scale)

    def outputs(self, r: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
        """Normed states that lm_head reads.

        Args:
            r: [N, D], states.
            depths: int64 [N], 0 for the root; deeper than trained is read by the last block.
        """
        depths = depths.clamp(max=self.num_heads - 1)
        out = torch.empty_like(r)
        for depth in depths.unique().tolist():
            here = depths == depth
            out[here] = self.heads[depth](r[here])
        return self.head_norm(out)

    @property
    def num_heads(self) -> int:
        return self.config.num_heads

    @staticmethod
    def embeddings_of(target: FrozenTarget) -> torch.Tensor:
        return target.lm_head

    def trained_states(self, batch: TeacherForced) -> torch.Tensor:
        r = batch.rows(self.augment(batch.hidden[:, :-1]))
        flat = batch.token_ids.flatten()
        states = []
        for i, head in enumerate(self.heads):
            tokens = flat[(batch.source + 1 + i).clamp(max=len(flat) - 1)]
            r = self.advance(r, F.embedding(tokens, batch.embed))
            states.append(self.head_norm(head(r)).float())
        return torch.stack(states)

    def drafters(self, prefix: Prefix, tables: DraftTables) -> Callable[[torch.Tensor], Clover1Drafter]:
        roots = self.advance(self.augment(prefix.hidden[None])[0], prefix.embeds)
        return lambda rows: Clover1Drafter(self, roots[rows], tables)

    @classmethod
    def new(cls, target: FrozenTarget, wanted: NewHead) -> Clover1DraftModel:
        from clover_vllm.heads.clover1.init import config_for_new, init_from_target

        head = cls(config_for_new(target, wanted))
        init_from_target(head, target.layers, target.norm, wanted.seed)
        head.draft_vocab = wanted.draft_vocab
        return head


class Clover1Drafter:
    """A `tree.Drafter`: a slot keeps its recurrent state and its depth."""

    def __init__(self, head: Clover1DraftModel, roots: torch.Tensor, tables: DraftTables) -> None:
        """
        Args:
            head: the reference model.
            roots: [R, D], states at the positions to draft from.
            tables: of the target.
        """
        self._head = head
        self._tables = tables
        self._states = roots[:, None]  # [R, slots, D]
        self._depths = torch.zeros(len(roots), 1, dtype=torch.int64, device=roots.device)

    def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        states = self._head.outputs(self._states[:, 0], self._depths[:, 0])
        return self._tables.score(states, num_candidates)

    def expand(
        self, parent_slots: torch.Tensor, tokens: torch.Tensor, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = parent_slots[..., None].expand(*parent_slots.shape, self._states.shape[-1])
        embeds = F.embedding(tokens, self._tables.embed).to(self._states.dtype)
        r = self._head.advance(self._states.gather(1, index), embeds)
        depths = self._depths.gather(1, parent_slots) + 1
        self._states = torch.cat([self._states, r], dim=1)
        self._depths = torch.cat([self._depths, depths], dim=1)
        states = self._head.outputs(r.flatten(0, 1), depths.flatten())
        return self._tables.score(states.view_as(r), num_candidates)
