"""Which sequences make which micro-batch, and the rows of a micro-batch that are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


def plan_batches(
    lengths: Sequence[int],
    answer_lengths: Sequence[int],
    answer_tokens: int,
    epochs: float,
    seed: int,
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

    Returns:
        sequence indices per micro-batch.
    """
    rng = np.random.default_rng(seed)
    total = int(sum(answer_lengths))
    wanted = epochs * total
    mean = max(1.0, total / max(1, len(lengths)))
    window = max(1, round(32 * answer_tokens / mean))
    plan: list[list[int]] = []
    seen = 0
    while seen < wanted:
        order = rng.permutation(len(lengths))
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
class Batch:
    """Sequences of one micro-batch, padded on the right (filled by `collate`)."""

    indices: list[int]  # of the sequences in the data set
    token_ids: torch.Tensor  # int64 [B, T], prompt then answer, padded with 0
    prompt_lengths: torch.Tensor  # int64 [B]
    lengths: torch.Tensor  # int64 [B]


def collate(indices: list[int], sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Build a Batch from (prompt ids, answer ids) pairs."""
    lengths = torch.tensor([len(p) + len(a) for p, a in sequences])
    token_ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for row, (prompt, answer) in enumerate(sequences):
        token_ids[row, : len(prompt)] = torch.from_numpy(prompt)
        token_ids[row, len(prompt) : len(prompt) + len(answer)] = torch.from_numpy(answer)
    return Batch(
        indices=list(indices),
        token_ids=token_ids,
        prompt_lengths=torch.tensor([len(p) for p, _ in sequences]),
        lengths=lengths,
    )


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


def trained_rows(batch: Batch, num_heads: int) -> Rows:
    """The rows of a batch for `num_heads` heads."""
    source, valid = [], []
    width = batch.token_ids.shape[1]
    for b, (prompt, length) in enumerate(
        zip(batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True)
    ):
        t = torch.arange(max(prompt - 1, 0), length - 2)
        source.append(b * width + t)
        valid.append(torch.stack([t + 2 + i < length for i in range(num_heads)]))
    return Rows(torch.cat(source), torch.cat(valid, dim=1))
