"""The training objective of a head, as one module that DistributedDataParallel can wrap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from clover_vllm.heads.base import Head, TeacherForced
from clover_vllm.train.batches import Batch, Rows, trained_rows
from clover_vllm.train.loss import VocabularyTargets, vocabulary_loss


@dataclass(frozen=True)
class LossWeights:
    """sum over heads i of decay^i * (regression * SmoothL1_i + vocabulary * CE_i).

    The defaults are Clover-2's; what a method publishes stands in `heads.registry`.
    """

    regression: float = 10.0
    vocabulary: float = 1.0
    decay: float = 0.7
    of_tokens: bool = False  # CE of the tokens that the target emitted, not of its distribution
    temperature: float = 1.0  # of the target's distribution
    acceptance: float = 0.0  # how fast CE gives way to total variation (see `VocabularyTargets`)


@dataclass
class Teacher:
    """The parts of the target that the loss needs, all frozen (filled once per run)."""

    embed: torch.Tensor  # [V, D], what `Head.embeddings_of` gave
    draft_head: torch.Tensor  # [draft V, D], lm_head rows that are drafted from
    drafted: torch.Tensor  # bool [V], whether a token id is drafted

    @cached_property
    def columns(self) -> torch.Tensor:
        """int64 [V], by token id its row of `draft_head`, or any where it is not drafted."""
        return (self.drafted.cumsum(0) - 1).clamp(min=0)


class DraftObjective(nn.Module):
    """Loss of a head on one batch.

    Holds the head alone, so that its state dict and its gradients are the head's; the target's
    tensors come with the call.
    """

    def __init__(self, head: Head, weights: LossWeights) -> None:
        super().__init__()
        self.head = head
        self.weights = weights

    def forward(
        self, batch: Batch, hidden: torch.Tensor, post_norm: torch.Tensor, teacher: Teacher
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and per-depth metrics of a batch.

        Args:
            batch: sequences.
            hidden: [B, T, D], the target's pre-norm hidden states.
            post_norm: [B, T, D], after its final norm.
            teacher: frozen parts of the target.

        Returns:
            scalar loss, and a dict of [heads] tensors: accuracy, vocabulary, regression.
        """
        device = hidden.device
        rows = batch.rows or trained_rows(batch, self.head.num_heads)
        rows = Rows(rows.source.to(device, non_blocking=True), rows.valid.to(device, non_blocking=True))
        ids = batch.token_ids.to(device, non_blocking=True)
        states = self.head.trained_states(TeacherForced(ids, hidden, post_norm, teacher.embed, rows.source))
        goal = post_norm.flatten(0, 1)[rows.source + 1]
        w = self.weights
        emitted = ids.flatten()[rows.source + 2]
        targets = VocabularyTargets(
            states=goal,
            weight=teacher.draft_head,
            valid=rows.valid,
            covered=teacher.drafted[emitted],
            tokens=teacher.columns[emitted] if w.of_tokens else None,
            temperature=w.temperature,
            acceptance=w.acceptance,
        )
        elements = 1 << (21 if device.type == "cpu" else 26)
        vocabulary, accuracy = vocabulary_loss(states, targets, elements)
        regression = _regression_loss(states, goal, rows.valid)
        per_head = w.regression * regression + w.vocabulary * vocabulary
        decay = w.decay ** torch.arange(len(per_head), device=device)
        metrics = {
            "accuracy": accuracy.detach(),
            "vocabulary": vocabulary.detach(),
            "regression": regression.detach(),
        }
        return (per_head * decay).sum(), metrics


def _regression_loss(states: torch.Tensor, goal: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean SmoothL1 per head between states [heads, N, D] and what they should be, float32 [heads]."""
    losses = []
    for i in range(states.shape[0]):
        n = states.shape[1] - i
        error = F.smooth_l1_loss(states[i, :n].float(), goal[i:].float(), reduction="none").mean(dim=-1)
        mask = valid[i, :n]
        losses.append((error * mask).sum() / mask.sum().clamp(min=1))
    return torch.stack(losses)
