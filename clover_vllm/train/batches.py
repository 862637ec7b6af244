"""Which sequences make which micro-batch, and the rows of a micro-batch that are trained on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

SET_ASIDE = 20
"""At most one sequence in this many is not trained on, for the validation loss."""


def plan_batches(
    lengths: Sequence[int],
    answer_lengths: Sequence[int],
    answer_tokens: int,
    epochs: float,
    seed: int,
    left_out: Collection[int] = (),
) -> list[list[int]]:
    """The whole run's micro-batches, fixed before it starts, so that resuming is a matter of skipping.

    Sequences are shuffled, then sorted by length within windows of 32 batches, so that little is
    padded, then cut at `answer_tokens`, or earlier where long prompts would make a batch of more
    than 8 times as many padded tokens; the batches of an epoch come in random order.

    Args:
        lengths: prompt plus answer tokens per sequence.
        answer_lengths: answer tokens per sequence.
        answer_tokens: answer tokens per micro-batch, about.
        epochs: passes over the sequences; a fraction cuts the last one short.
        seed: of the order.
        left_out: sequences that are not trained on.

    Returns:
        sequence indices per micro-batch.
    """
    rng = np.random.default_rng(seed)
    among = np.delete(np.arange(len(lengths)), list(left_out))
    total = sum(answer_lengths[i] for i in among)
    wanted = epochs * total
    mean = max(1.0, total / max(1, len(among)))
    window = max(1, round(32 * answer_tokens / mean))
    plan: list[list[int]] = []
    seen = 0
    while seen < wanted:
        order = rng.permutation(among)
        epoch: list[list[int]] = []
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window].tolist(), key=lambda i: lengths[i])
            epoch.extend(_cut(part, lengths, answer_lengths, answer_tokens))
        for k in rng.permutation(len(epoch)):
            if seen >= wanted:
                break
            plan.append(epoch[k])
            seen += sum(answer_lengths[i] for i in epoch[k])
    return plan


def plan_validation(
    lengths: Sequence[int], answer_lengths: Sequence[int], answer_tokens: int, most: int, seed: int
) -> list[list[int]]:
    """Micro-batches of sequences to set aside: drawn at random, and at most one in `SET_ASIDE`.

    Args:
        lengths, answer_lengths, answer_tokens, seed: as for `plan_batches`.
        most: sequences.
    """
    count = min(most, len(lengths) // SET_ASIDE)
    chosen = np.random.default_rng(seed).permutation(len(lengths))[:count].tolist()
    return _cut(sorted(chosen, key=lambda i: lengths[i]), lengths, answer_lengths, answer_tokens)


def _cut(
    part: list[int], lengths: Sequence[int], answer_lengths: Sequence[int], answer_tokens: int
) -> list[list[int]]:
    """Cut into batches, each closed by the sequence that brings it nearest to `answer_tokens`."""
    batches: list[list[int]] = []
    current: list[int] = []
    count = 0
    for i in part:
        # `part` is sorted, so the newest sequence is the longest and sets the width.
        too_wide = (len(current) + 1) * lengths[i] > 8 * answer_tokens
        if current and (too_wide or count + answer_lengths[i] / 2 > answer_tokens):
            batches.append(current)
            current, count = [], 0
        current.append(i)
        count += answer_lengths[i]
    if current:
        batches.append(current)
    return batches


@dataclass
class Rows:
    """Positions that drafting starts from, and what each head predicts there.

    Row n stands for position t of a sequence, from the last prompt position to the third last of
    the sequence: the token at t + 1 is an answer token already emitted, head i predicts t + 2 + i.
    Rows are sorted by sequence and position, so what head i predicts at row n is what head 0
    predicts at row n + i, where `valid[i, n]`.
    """

    source: torch.Tensor  # int64 [N], index b * T + t into flattened [B, T]
    valid: torch.Tensor  # bool [heads, N]

    def pin_memory(self) -> Rows:
        """Copies that a GPU reads without waiting; PyTorch's loader asks for it."""
        return Rows(self.source.pin_memory(), self.valid.pin_memory())


@dataclass
class Batch:
    """Sequences of one micro-batch, padded on the right (filled by `collate`)."""

    indices: list[int]  # of the sequences in the data set
    token_ids: torch.Tensor  # int64 [B, T], prompt then answer, padded with 0
    prompt_lengths: torch.Tensor  # int64 [B]
    lengths: torch.Tensor  # int64 [B]
    rows: Rows | None = None  # as `trained_rows` gives, where they were made beforehand

    def pin_memory(self) -> Batch:
        """As `Rows.pin_memory`."""
        rows = self.rows and self.rows.pin_memory()
        return replace(self, token_ids=self.token_ids.pin_memory(), rows=rows)


def collate(
    indices: list[int], sequences: Sequence[tuple[np.ndarray, np.ndarray]], num_heads: int | None = None
) -> Batch:
    """Build a Batch from (prompt ids, answer ids) pairs, with its rows where `num_heads` is given."""
    lengths = torch.tensor([len(p) + len(a) for p, a in sequences])
    token_ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, (prompt, answer) in enumerate(sequences):
        token_ids[row, : len(prompt)] = torch.from_numpy(prompt)
        token_ids[row, len(prompt) : len(prompt) + len(answer)] = torch.from_numpy(answer)
    batch = Batch(
        indices=list(indices),
        token_ids=token_ids,
        prompt_lengths=torch.tensor([len(p) for p, _ in sequences]),
        lengths=lengths,
    )
    if num_heads is not None:
        batch.rows = trained_rows(batch, num_heads)
    return batch


def trained_rows(batch: Batch, num_heads: int) -> Rows:
    """The rows of a batch for `num_heads` heads."""
    width = batch.token_ids.shape[1]
    first = (batch.prompt_lengths - 1).clamp(min=0)
    counts = (batch.lengths - 2 - first).clamp(min=0)
    sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.arange(len(sequence)) - (counts.cumsum(0) - counts)[sequence]
    left = counts[sequence] - place  # tokens behind the one at t + 1
    valid = torch.arange(num_heads)[:, None] < left
    return Rows(sequence * width + first[sequence] + place, valid)
