"""Reference Medusa heads in plain PyTorch (arXiv 2401.10774, section 2.1).

Head i reads the target's last hidden state at t, after the final norm, and predicts the token at t + 2 + i, whatever
the tokens between are. The paper trains an output layer per head, which starts as a copy of the target's lm_head;
its later published code shares the lm_head, and so do the heads that are trained here, so that all methods' heads
read equal tables. Heads with output layers of their own can be converted, evaluated and served.

Legend: N rows of any kind, H heads, D hidden size, V vocabulary that is drafted from, R positions, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from clover_vllm.base.errors import UserError
from clover_vllm.heads.base import DraftTables, NewHead, Prefix, TeacherForced
from clover_vllm.heads.layers import ResBlock
from clover_vllm.heads.medusa.config import MedusaTreesConfig
from clover_vllm.heads.saved import SavedHead
from clover_vllm.heads.weights import probe_lm_head

if TYPE_CHECKING:
    from clover_vllm.target.frozen import FrozenTarget


class MedusaTreesDraftModel(SavedHead):
    """Medusa's heads: residual blocks, then a view on the vocabulary.

    Attributes:
        heads: by depth, its blocks.
        lm_heads: [H, V, D], output layers of their own, or None where all read the target's lm_head.
    """

    config: MedusaTreesConfig
    config_class = MedusaTreesConfig
    title = "Medusa"

    def __init__(self, config: MedusaTreesConfig) -> None:
        super().__init__(config)
        self.heads = nn.ModuleList(
            nn.Sequential(*(ResBlock(config.hidden_size) for _ in range(config.num_hidden_layers)))
            for _ in range(config.num_heads)
        )
        self.lm_heads: nn.Parameter | None = None
        if config.own_lm_heads:
            rows = config.draft_vocab_size or config.vocab_size
            self.lm_heads = nn.Parameter(torch.empty(config.num_heads, rows, config.hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """States of all depths, [H, ..., D], from the target's post-norm hidden states [..., D]."""
        return torch.stack([head(features) for head in self.heads])

    def candidates(
        self, features: torch.Tensor, tables: DraftTables, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Best tokens of all depths.

        Args:
            features: [R, D], the target's post-norm hidden states.
            tables: of the target.
            num_candidates: K.

        Returns:
            float32 [H, R, K] log-probabilities, falling, and int64 [H, R, K] token ids.
        """
        states = self(features)
        if self.lm_heads is None:
            return tables.score(states, num_candidates)
        found = [
            DraftTables(tables.embed, own.to(tables.draft_head.dtype), tables.draft_vocab).score(
                state, num_candidates
            )
            for state, own in zip(states, self.lm_heads, strict=True)
        ]
        return torch.stack([scores for scores, _ in found]), torch.stack([tokens for _, tokens in found])

    @property
    def num_heads(self) -> int:
        return self.config.num_heads

    @staticmethod
    def embeddings_of(target: FrozenTarget) -> torch.Tensor:
        return target.lm_head  # not read

    def trained_states(self, batch: TeacherForced) -> torch.Tensor:
        if self.lm_heads is not None:
            raise UserError(
                "Medusa heads with output layers of their own cannot be trained further; start with new ones, which "
                "read the target's lm_head."
            )
        return self(batch.rows(batch.post_norm)).float()

    def drafters(self, prefix: Prefix, tables: DraftTables) -> Callable[[torch.Tensor], MedusaDrafter]:
        return lambda rows: MedusaDrafter(self, prefix.post_norm[rows], tables)

    @classmethod
    def new(cls, target: FrozenTarget, wanted: NewHead) -> MedusaTreesDraftModel:
        """Blocks that change nothing, as published: every head starts as the target's own prediction."""
        config = MedusaTreesConfig(
            hidden_size=target.lm_head.shape[1],
            vocab_size=target.lm_head.shape[0],
            num_heads=wanted.num_heads,
            draft_vocab_size=None if wanted.draft_vocab is None else len(wanted.draft_vocab),
            max_position_embeddings=target.config.max_position_embeddings,
            target=target.name,
            target_probe=probe_lm_head(target.lm_head),
        )
        head = cls(config)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        head.draft_vocab = wanted.draft_vocab
        return head


class MedusaDrafter:
    """A `tree.Drafter`: all depths are known at once, a tree is a part of their product (section 2.1.2)."""

    def __init__(self, head: MedusaTreesDraftModel, features: torch.Tensor, tables: DraftTables) -> None:
        """
        Args:
            head: the reference model.
            features: [R, D], the target's post-norm hidden states at the positions to draft from.
            tables: of the target.
        """
        self._head = head
        self._features = features
        self._tables = tables

    def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores, tokens = self._head.candidates(self._features, self._tables, num_candidates)
        self._levels = ProductOfDepths(scores, tokens)
        return scores[0], tokens[0]

    def expand(
        self, parent_slots: torch.Tensor, tokens: torch.Tensor, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del tokens  # what stands there changes nothing
        scores, children = self._levels.expand(parent_slots)
        return scores[..., :num_candidates], children[..., :num_candidates]


class ProductOfDepths:
    """Continuations that depend on a node's depth alone, with the slots of `tree.Drafter`."""

    def __init__(self, scores: torch.Tensor, tokens: torch.Tensor) -> None:
        """
        Args:
            scores: float32 [H, R, K], log-probabilities by depth.
            tokens: int64 [H, R, K].
        """
        nothing = torch.full_like(scores[:1], -torch.inf)  # deeper than the last head
        self._scores = torch.cat([scores, nothing])
        self._tokens = torch.cat([tokens, tokens[:1]])
        self._depths = torch.zeros(scores.shape[1], 1, dtype=torch.int64, device=tokens.device)

    def expand(self, parent_slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Best continuations [R, W, K] of nodes whose parents are given, [R, W], which get the next slots."""
        depths = self._depths.gather(1, parent_slots) + 1
        self._depths = torch.cat([self._depths, depths], dim=1)
        depths = depths.clamp(max=len(self._scores) - 1)
        rows = torch.arange(len(depths), device=depths.device)[:, None]
        return self._scores[depths, rows], self._tokens[depths, rows]
