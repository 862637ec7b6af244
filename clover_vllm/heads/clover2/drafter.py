"""Drafting with the reference Clover-2 head, from many positions at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from clover_vllm.heads.base import DraftTables

if TYPE_CHECKING:
    from clover_vllm.heads.clover2.model import Clover2DraftModel


class Clover2Drafter:
    """A `tree.Drafter`: a slot keeps its recurrent state."""

    def __init__(self, head: Clover2DraftModel, g: torch.Tensor, tables: DraftTables) -> None:
        """
        Args:
            head: the reference model.
            g: [R, D], augmenting outputs of the positions to draft from.
            tables: of the target.
        """
        self._head = head
        self._tables = tables
        self._states = g[:, None]
        self._g = g

    def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._tables.score(self._head.first(self._g), num_candidates)

    def expand(
        self, parent_slots: torch.Tensor, tokens: torch.Tensor, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = parent_slots[..., None].expand(*parent_slots.shape, self._states.shape[-1])
        embeds = F.embedding(tokens, self._tables.embed).to(self._states.dtype)
        r, s = self._head.advance(self._states.gather(1, index), embeds)
        self._states = torch.cat([self._states, r], dim=1)
        return self._tables.score(s, num_candidates)
