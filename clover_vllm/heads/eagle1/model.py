"""EAGLE-1 (arXiv 2401.15077): the baseline that the Clover-2 paper compares with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from clover_vllm.heads.base import DraftTables, Head, NewHead, Prefix, TeacherForced
from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.clover2.init import config_for_new
from clover_vllm.heads.eagle1.drafter import Eagle1Drafter, Eagle1Prefix
from clover_vllm.heads.eagle1.init import init_eagle1
from clover_vllm.heads.layers import DecoderLayer, KVCache, Rotary

if TYPE_CHECKING:
    from clover_vllm.target.frozen import FrozenTarget


class Eagle1DraftModel(Head):
    """[embedding; feature] -> fc -> one decoder layer -> the next feature.

    A feature is the target's hidden state *after* its final norm, and lm_head reads the head's
    output directly, as vLLM's `EagleLlamaForCausalLM` does. The layer has no input norm.
    """

    config: Clover2Config
    saves_draft_vocab = False  # vLLM's model has no place for it

    def __init__(self, config: Clover2Config, fc_bias: bool = False) -> None:
        """
        Args:
            config: lends its sizes; its Clover-2 constants are not used. The layer is a plain Llama's, as vLLM's, so
                it never norms queries and keys.
            fc_bias: as some published checkpoints have; vLLM's model has none.
        """
        super().__init__()
        config = copy.copy(config)
        config.qk_norm = False
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList([DecoderLayer(config, input_norm=False)])
        self.rotary = Rotary(config)
        self.register_buffer("draft_vocab", None, persistent=False)

    def new_cache(self) -> list[KVCache]:
        """An empty key/value cache for the one layer."""
        return [KVCache()]

    def forward(
        self, features: torch.Tensor, embeds: torch.Tensor, cache: Sequence[KVCache] | None = None
    ) -> torch.Tensor:
        """Features one position on.

        Args:
            features: [B, T, D], post-norm hidden states at t.
            embeds: [B, T, D], embeddings of the tokens at t + 1.
            cache: when the positions continue an earlier call; grown in place.

        Returns:
            [B, T, D], predicted post-norm hidden states at t + 1.
        """
        past = cache[0].length if cache else 0
        positions = torch.arange(past, past + features.shape[1], device=features.device)[None]
        cos, sin = self.rotary(positions)
        x = self.fc(torch.cat([embeds, features], dim=-1))
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache[index] if cache else None)
        return x

    @property
    def num_heads(self) -> int:
        return 1

    @staticmethod
    def embeddings_of(target: FrozenTarget) -> torch.Tensor:
        return target.embed_tokens

    def trained_states(self, batch: TeacherForced) -> torch.Tensor:
        embeds = F.embedding(batch.token_ids[:, 1:], batch.embed)
        return batch.rows(self(batch.post_norm[:, :-1], embeds))[None]

    def drafters(self, prefix: Prefix, tables: DraftTables) -> Callable[[torch.Tensor], Eagle1Drafter]:
        known = Eagle1Prefix.of(self, prefix.post_norm, prefix.embeds)
        return lambda rows: Eagle1Drafter(self, known, rows, tables)

    @classmethod
    def new(cls, target: FrozenTarget, wanted: NewHead) -> Eagle1DraftModel:
        head = cls(config_for_new(target, wanted))
        init_eagle1(head, wanted.seed)
        head.draft_vocab = wanted.draft_vocab
        return head

    @classmethod
    def load(cls, folder: Path) -> Eagle1DraftModel:
        from clover_vllm.heads.eagle1.checkpoint import load_eagle1

        return load_eagle1(folder)

    def save(self, folder: Path, target: str) -> None:
        from clover_vllm.heads.eagle1.checkpoint import save_eagle1

        save_eagle1(self, folder, target)
