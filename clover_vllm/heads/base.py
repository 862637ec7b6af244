"""What every draft head is, whatever its method: the trainer and the evaluator speak to this alone.

A method is a folder beside this file with a subclass of `Head`, and a line in `heads.registry`.

Legend: B sequences, T positions, D hidden size, V vocabulary, N rows of any kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import nn

from clover_vllm.tree import Drafter

if TYPE_CHECKING:
    from clover_vllm.target.frozen import FrozenTarget


class HeadConfig(Protocol):
    """The fields of a head's configuration that say which target it was made for."""

    hidden_size: int
    vocab_size: int
    target: str | None
    target_probe: list[float] | None


@dataclass(frozen=True)
class NewHead:
    """What a new head is made from, besides its target (filled by the trainer)."""

    num_heads: int  # draft depths to train, for methods that have several
    draft_vocab: torch.Tensor | None  # int64, increasing token ids to draft from; None for all
    hidden: torch.Tensor  # [N, D], the target's pre-norm hidden states at ordinary positions
    token_ids: torch.Tensor  # int64 [N], the tokens there
    scale_inputs: bool  # whether the head may scale its inputs to an RMS of 1
    seed: int
    fields: Mapping[str, Any] = field(default_factory=dict)  # of its configuration, that were asked for


@dataclass(frozen=True)
class TeacherForced:
    """A batch of sequences whose tokens are all known (filled by the objective)."""

    token_ids: torch.Tensor  # int64 [B, T]
    hidden: torch.Tensor  # [B, T, (1 + target layers) D], pre-norm, behind those of `Head.target_layers`
    post_norm: torch.Tensor  # [B, T, D], after its final norm
    embed: torch.Tensor  # [V, D], what `Head.embeddings_of` gave
    source: torch.Tensor  # int64 [N], positions to draft from, as b * T + t

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [N, D] of x [B, T - 1, D] at the positions to draft from."""
        width = self.token_ids.shape[1]
        return x[self.source // width, self.source % width]


@dataclass(frozen=True)
class Prefix:
    """One sequence that the target has seen (filled by the evaluator)."""

    hidden: torch.Tensor  # float32 [T, (1 + target layers) D], pre-norm, behind those of `Head.target_layers`
    post_norm: torch.Tensor  # float32 [T, D]
    embeds: torch.Tensor  # float32 [T, D], of the tokens one further on


@dataclass(frozen=True)
class DraftTables:
    """The target's tables that drafting reads (filled by the evaluator)."""

    embed: torch.Tensor  # [V, D], what `Head.embeddings_of` gave
    draft_head: torch.Tensor  # [draft V, D], lm_head rows that are scored
    draft_vocab: torch.Tensor | None  # int64 [draft V], their token ids; None for all

    def score(self, states: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Best tokens by lm_head.

        Args:
            states: [..., D], normed states.
            num_candidates: K, or all where there are fewer.

        Returns:
            float32 [..., K] log-probabilities, falling, and int64 [..., K] token ids.
        """
        logits = (states.to(self.draft_head.dtype) @ self.draft_head.T).float()
        best, index = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
        log_probs = best - logits.logsumexp(dim=-1, keepdim=True)
        return log_probs, index if self.draft_vocab is None else self.draft_vocab[index]


class Head(nn.Module, ABC):
    """A draft head: everything that differs from method to method.

    Attributes:
        config: its sizes and constants.
        draft_vocab: int64, increasing token ids that it drafts from, or None for all.
        saves_draft_vocab: whether its checkpoint holds them.
        target_layers: layers of the target whose input the head reads besides the last one's output.
    """

    config: Any
    draft_vocab: torch.Tensor | None
    saves_draft_vocab: bool = True

    @property
    def target_layers(self) -> Sequence[int]:
        return ()

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """Draft depths that are trained."""

    @staticmethod
    @abstractmethod
    def embeddings_of(target: FrozenTarget) -> torch.Tensor:
        """The target's table [V, D] that the head takes token embeddings from."""

    @abstractmethod
    def trained_states(self, batch: TeacherForced) -> torch.Tensor:
        """Normed states [num_heads, N, D]: depth i at row n predicts the token at t + 2 + i."""

    @abstractmethod
    def drafters(self, prefix: Prefix, tables: DraftTables) -> Callable[[torch.Tensor], Drafter]:
        """Run the head over a sequence, once.

        Returns:
            a maker of drafters that start at the given positions, int64 [R].
        """

    @classmethod
    @abstractmethod
    def new(cls, target: FrozenTarget, wanted: NewHead) -> Self:
        """First weights for a target, on the CPU.

        Raises:
            UserError: the target is not one that the method can start from.
        """

    @classmethod
    @abstractmethod
    def load(cls, folder: Path) -> Self:
        """Read a head folder in float32.

        Raises:
            UserError: anything missing, damaged, misshapen or not finite.
        """

    @abstractmethod
    def save(self, folder: Path, target: str) -> None:
        """Write a head folder in bfloat16; `target` is the folder or hub name of its target.

        Raises:
            UserError: a weight is not finite, or the folder cannot be written.
        """
