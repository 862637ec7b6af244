"""The training objective of DESIGN's two heads, as one module that DistributedDataParallel can wrap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from clover_vllm.heads.clover2.model import Clover2DraftModel
from clover_vllm.heads.eagle1.model import Eagle1DraftModel
from clover_vllm.train.batches import Batch, Rows, trained_rows
from clover_vllm.train.loss import VocabularyTargets, vocabulary_loss


@dataclass(frozen=True)
class LossWeights:
    """sum over heads i of decay^i * (regression * SmoothL1_i + vocabulary * CE_i).

    The defaults are Clover-2's; EAGLE-1 publishes regression 1 and vocabulary 0.1.
    """

    regression: float = 10.0
    vocabulary: float = 1.0
    decay: float = 0.7


@dataclass
class Teacher:
    """The parts of the target that the loss needs, all frozen (filled once per run)."""

    embed: torch.Tensor  # [V, D], token embeddings of the head: lm_head for Clover-2
    draft_head: torch.Tensor  # [draft V, D], lm_head rows that are drafted from
    drafted: torch.Tensor  # bool [V], whether a token id is drafted


class DraftObjective(nn.Module):
    """Loss of a head on one batch.

    Holds the head alone, so that its state dict and its gradients are the head's; the target's
    tensors come with the call.
    """

    def __init__(self, head: Clover2DraftModel | Eagle1DraftModel, weights: LossWeights) -> None:
        super().__init__()
        self.head = head
        self.weights = weights
        self.num_heads = head.config.num_heads if isinstance(head, Clover2DraftModel) else 1

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
        rows = trained_rows(batch, self.num_heads)
        device = hidden.device
        rows = Rows(rows.source.to(device), rows.valid.to(device))
        ids = batch.token_ids.to(device)
        states = self._states(rows, ids, hidden, post_norm, teacher)
        goal = post_norm.flatten(0, 1)[rows.source + 1]
        targets = VocabularyTargets(
            states=goal,
            weight=teacher.draft_head,
            valid=rows.valid,
            covered=teacher.drafted[ids.flatten()[rows.source + 2]],
        )
        elements = 1 << (21 if device.type == "cpu" else 26)
        vocabulary, accuracy = vocabulary_loss(states, targets, elements)
        regression = _regression_loss(states, goal, rows.valid)
        w = self.weights
        per_head = w.regression * regression + w.vocabulary * vocabulary
        decay = w.decay ** torch.arange(len(per_head), device=device)
        metrics = {
            "accuracy": accuracy.detach(),
            "vocabulary": vocabulary.detach(),
            "regression": regression.detach(),
        }
        return (per_head * decay).sum(), metrics

    def _states(
        self,
        rows: Rows,
        ids: torch.Tensor,
        hidden: torch.Tensor,
        post_norm: torch.Tensor,
        teacher: Teacher,
    ) -> torch.Tensor:
        """Normed states of every head at the trained rows, [heads, N, D]."""
        embeds = F.embedding(ids[:, 1:], teacher.embed)
        if isinstance(self.head, Eagle1DraftModel):
            features = self.head(post_norm[:, :-1], embeds)
            return _padded_rows(features, rows.source, ids.shape[1])[None]
        g = _padded_rows(self.head.augment(hidden[:, :-1], embeds), rows.source, ids.shape[1])
        flat = ids.flatten()
        last = len(flat) - 1
        nexts = [
            F.embedding(flat[(rows.source + 1 + i).clamp(max=last)], teacher.embed)
            for i in range(1, self.num_heads)
        ]
        return torch.stack([s.float() for s in self.head.draft_states(g, nexts)])


def _padded_rows(x: torch.Tensor, source: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of x [B, width - 1, D] by indices into flattened [B, width]."""
    b, t = source // width, source % width
    return x[b, t]


def _regression_loss(states: torch.Tensor, goal: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean SmoothL1 per head between states [heads, N, D] and what they should be, float32 [heads]."""
    losses = []
    for i in range(states.shape[0]):
        n = states.shape[1] - i
        error = F.smooth_l1_loss(states[i, :n].float(), goal[i:].float(), reduction="none").mean(dim=-1)
        mask = valid[i, :n]
        losses.append((error * mask).sum() / mask.sum().clamp(min=1))
    return torch.stack(losses)
