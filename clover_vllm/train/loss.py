"""The vocabulary loss of all heads at once, in bounded memory.

For head i the loss is the cross entropy between the target's distribution, or the token that it
emitted, and the head's distribution, over the vocabulary that is drafted from. With `acceptance` a
row moves on to what decides whether drafts are accepted, the total variation between the two, as it
is learnt (the hybrid LK loss, arXiv 2602.23881). A [rows, vocabulary] matrix for every head of a batch would be
gigabytes with a 128k vocabulary, so the rows are taken in chunks and the gradient with respect to
the head's states is formed on the spot; nothing of vocabulary size outlives a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class VocabularyTargets:
    """What the heads should predict, shared by all heads of a batch.

    Row n + i of the answer-aligned arrays is what head i predicts from row n (see `batches.Rows`).
    """

    states: torch.Tensor  # [N, D], the target's post-norm states for the same predictions
    weight: torch.Tensor  # [V, D], lm_head rows that are drafted from (frozen)
    valid: torch.Tensor  # bool [heads, N], whether head i has a prediction at row n
    covered: torch.Tensor  # bool [N], whether the token at row n is one that can be drafted
    tokens: torch.Tensor | None = (
        None  # int64 [N], its row of `weight`, where it is what counts, not `states`
    )
    temperature: float = 1.0  # of the target's distribution; lower is nearer to its greedy choice
    acceptance: float = 0.0  # share e^(-acceptance * a) of a row's loss is cross entropy, the rest total
    # variation 1 - a, where the acceptance rate a is the sum of min(p, q)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, targets: VocabularyTargets, chunk_elements: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads, rows, _ = states.shape
        weight = targets.weight
        low = states.detach().to(weight.dtype)
        goal = targets.states.to(weight.dtype)
        used = used_rows(targets)
        count = used.sum(dim=1).clamp(min=1).float()
        loss = states.new_zeros(heads, dtype=torch.float32)
        right = states.new_zeros(heads, dtype=torch.float32)
        gradient = torch.zeros_like(low)
        step = max(8, chunk_elements // weight.shape[0])
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            # Head i looks i rows ahead, so one chunk of target distributions serves all heads.
            p = _distribution(targets, goal, slice(start, stop + heads - 1))
            best = p.argmax(dim=-1)
            for i in range(heads):
                n = min(stop, rows - i) - start
                if n <= 0:
                    continue
                mask = used[i, start : start + n]
                logits = (low[i, start : start + n] @ weight.T).float()
                top, index = logits.max(dim=-1)
                q = torch.softmax(logits, dim=-1)
                log_z = top - q.gather(1, index[:, None]).squeeze(1).log()
                p_i = p[i : i + n]
                right[i] += ((index == best[i : i + n]) & mask).sum()
                row_loss = log_z - (p_i * logits).sum(dim=-1)
                if targets.acceptance:
                    distance, slope = _total_variation(p_i, q)
                    share = torch.exp(targets.acceptance * (distance - 1))
                    row_loss = share * row_loss + (1 - share) * distance
                    slope.mul_((1 - share)[:, None]).add_(q.sub_(p_i).mul_(share[:, None]))
                else:
                    slope = q.sub_(p_i)
                loss[i] += (row_loss * mask).sum()
                slope.mul_((mask / count[i])[:, None])
                gradient[i, start : start + n] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.dtype = states.dtype
        accuracy = right / count
        ctx.mark_non_differentiable(accuracy)
        return loss / count, accuracy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grads[0][:, None, None]).to(ctx.dtype), None, None


def _total_variation(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Total variation [rows] between distributions [rows, V], and its gradient by the logits of q."""
    over = q > p
    slope = q * over
    surplus = slope.sum(dim=-1)
    slope.sub_(q * surplus[:, None])
    return surplus - (p * over).sum(dim=-1), slope


def _distribution(targets: VocabularyTargets, goal: torch.Tensor, rows: slice) -> torch.Tensor:
    """What should be predicted for some rows: float32 [rows, V].

    Args:
        targets: of a batch.
        goal: their states, in the weight's dtype.
        rows: of these.
    """
    if targets.tokens is None:
        return torch.softmax((goal[rows] @ targets.weight.T).float() / targets.temperature, dim=-1)
    tokens = targets.tokens[rows]
    p = torch.zeros(len(tokens), len(targets.weight), device=tokens.device)
    return p.scatter_(1, tokens[:, None], 1.0)


def used_rows(targets: VocabularyTargets) -> torch.Tensor:
    """bool [heads, N]: rows with a prediction whose token can be drafted.

    A draft vocabulary renormalises the target's distribution over its ids. Where the token that
    was really emitted is not among them, that distribution says little, so the row is left out.
    """
    used = targets.valid.clone()
    for i in range(used.shape[0]):
        n = used.shape[1] - i
        used[i, :n] &= targets.covered[i:]
        used[i, n:] = False
    return used


def vocabulary_loss(
    states: torch.Tensor, targets: VocabularyTargets, chunk_elements: int = 1 << 21
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of every head against the target.

    Args:
        states: [heads, N, D], normed head states; gradients flow into them.
        targets: what they should predict.
        chunk_elements: largest [rows, vocabulary] matrix held at once, in elements.

    Returns:
        loss [heads] in nats per row, and [heads] share of rows whose most likely token is the
        target's (both float32; the second without gradient).
    """
    return _ChunkedCrossEntropy.apply(states, targets, chunk_elements)  # type: ignore[no-any-return]
