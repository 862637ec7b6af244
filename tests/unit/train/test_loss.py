"""The chunked loss equals the dense one, and rows line up with tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.target.frozen import FrozenTarget
from clover_vllm.train.batches import Batch, collate, plan_batches, plan_validation, trained_rows
from clover_vllm.train.loss import VocabularyTargets, vocabulary_loss
from clover_vllm.train.objective import DraftObjective, LossWeights, Teacher


def random_batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    pairs = [
        (rng.integers(1, 211, int(p)), rng.integers(1, 211, int(a)))
        for p, a in [(3, 9), (1, 2), (6, 1), (2, 14), (4, 5)]
    ]
    return collate([0, 1, 2, 3, 4], pairs)


def test_rows_are_the_positions_that_drafting_starts_from() -> None:
    batch = random_batch()
    rows = trained_rows(batch, 5)
    width = batch.token_ids.shape[1]
    expected = [
        (b, t)
        for b, (p, n) in enumerate(zip(batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True))
        for t in range(p - 1, n - 2)
    ]
    assert [(s // width, s % width) for s in rows.source.tolist()] == expected
    for i in range(5):
        lengths = batch.lengths.tolist()
        assert rows.valid[i].tolist() == [t + 2 + i < lengths[b] for b, t in expected]
        for n, ((b, t), valid) in enumerate(zip(expected, rows.valid[i].tolist(), strict=True)):
            if valid:  # what head i predicts at row n is what head 0 predicts at row n + i
                assert expected[n + i] == (b, t + i)


@pytest.mark.parametrize(("of_tokens", "acceptance"), [(False, 0.0), (True, 0.0), (False, 3.0)])
@pytest.mark.parametrize("chunk_elements", [1, 400, 10**6])
def test_chunked_loss_and_gradient_equal_dense(
    chunk_elements: int, of_tokens: bool, acceptance: float
) -> None:
    torch.manual_seed(0)
    heads, rows, size, vocab = 3, 40, 16, 50
    states = torch.randn(heads, rows, size, requires_grad=True)
    goal, weight = torch.randn(rows, size), torch.randn(vocab, size)
    valid = torch.rand(heads, rows) < 0.8
    for i in range(heads):
        valid[i, rows - i :] = False
    covered = torch.rand(rows) < 0.9
    tokens = torch.randint(vocab, (rows,)) if of_tokens else None
    temperature = 0.5 if acceptance else 1.0
    targets = VocabularyTargets(goal, weight, valid, covered, tokens, temperature, acceptance)
    loss, accuracy = vocabulary_loss(states, targets, chunk_elements)
    scale = torch.tensor([1.0, 0.7, 0.49])
    (gradient,) = torch.autograd.grad((loss * scale).sum(), states)

    dense, right = [], []
    p = (
        torch.softmax(goal @ weight.T / temperature, -1)
        if tokens is None
        else F.one_hot(tokens, vocab).float()
    )
    best = p.argmax(-1)
    for i in range(heads):
        terms = []
        for n in range(rows):
            if valid[i, n] and covered[n + i]:
                logits = states[i, n] @ weight.T
                term = -(p[n + i] * F.log_softmax(logits, -1)).sum()
                if acceptance:
                    accepted = torch.minimum(p[n + i], torch.softmax(logits, -1)).sum()
                    share = torch.exp(-acceptance * accepted.detach())
                    term = share * term + (1 - share) * (1 - accepted)
                terms.append((term, logits, n + i))
        dense.append(torch.stack([t[0] for t in terms]).mean())
        right.append(float(np.mean([int(t[1].argmax()) == int(best[t[2]]) for t in terms])))
    expected = torch.stack(dense)
    (expected_gradient,) = torch.autograd.grad((expected * scale).sum(), states)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(accuracy, torch.tensor(right))
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-4)


def test_objective_equals_the_published_formula(
    frozen: FrozenTarget, fitting_head: Clover2DraftModel
) -> None:
    """sum_i 0.7^i (10 SmoothL1 + CE), teacher-forced, spelled out per sequence and position."""
    batch = random_batch()
    hidden = frozen.hidden_states(batch.token_ids)
    post = frozen.norm(hidden)
    everything = torch.ones(211, dtype=torch.bool)
    teacher = Teacher(frozen.lm_head, frozen.lm_head, everything)
    loss, _ = DraftObjective(fitting_head, LossWeights())(batch, hidden, post, teacher)
    terms: list[list[torch.Tensor]] = [[] for _ in range(5)]
    embeds = F.embedding(batch.token_ids, frozen.lm_head)
    for b, (p, n) in enumerate(zip(batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True)):
        g = fitting_head.augment(hidden[b : b + 1, : n - 1], embeds[b : b + 1, 1:n])[0]
        for t in range(p - 1, n - 2):
            r, s = g[t], fitting_head.first(g[t])
            for i in range(5):
                if i:
                    if t + 2 + i >= n:
                        break
                    r, s = fitting_head.advance(r, embeds[b, t + 1 + i])
                y = post[b, t + 1 + i]
                p_i = torch.softmax(frozen.lm_head @ y, -1)
                cross = -(p_i * F.log_softmax(frozen.lm_head @ s, -1)).sum()
                terms[i].append(10 * F.smooth_l1_loss(s, y) + cross)
    expected = sum(0.7**i * torch.stack(t).mean() for i, t in enumerate(terms))
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_padding_does_not_change_the_loss(frozen: FrozenTarget, fitting_head: Clover2DraftModel) -> None:
    batch = random_batch()
    padded = Batch(
        batch.indices, F.pad(batch.token_ids, (0, 7), value=9), batch.prompt_lengths, batch.lengths
    )
    teacher = Teacher(frozen.lm_head, frozen.lm_head, torch.ones(211, dtype=torch.bool))
    losses = []
    for one in (batch, padded):
        hidden = frozen.hidden_states(one.token_ids)
        losses.append(
            DraftObjective(fitting_head, LossWeights())(one, hidden, frozen.norm(hidden), teacher)[0]
        )
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    answers=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    budget=st.integers(1, 200),
    epochs=st.floats(0.1, 3.0),
    seed=st.integers(0, 99),
)
def test_plan_visits_every_answer_once_per_epoch(
    answers: list[int], budget: int, epochs: float, seed: int
) -> None:
    lengths = [a + 3 for a in answers]
    plan = plan_batches(lengths, answers, budget, epochs, seed)
    assert plan == plan_batches(lengths, answers, budget, epochs, seed)
    whole = int(epochs)
    order = [i for batch in plan for i in batch]
    assert all(batch for batch in plan)
    for epoch in range(whole):
        part = order[epoch * len(answers) : (epoch + 1) * len(answers)]
        assert sorted(part) == list(range(len(answers)))
    visited = sum(answers[i] for i in order)
    assert visited >= epochs * sum(answers) - 1e-6
    for batch in plan:
        assert sum(answers[i] for i in batch) <= max(1.5 * budget + 60, max(answers[i] for i in batch))


@settings(max_examples=50, deadline=None)
@given(
    answers=st.lists(st.integers(1, 60), min_size=1, max_size=200),
    budget=st.integers(1, 200),
    most=st.integers(0, 12),
)
def test_answers_set_aside_are_in_no_plan(answers: list[int], budget: int, most: int) -> None:
    lengths = [a + 3 for a in answers]
    batches = plan_validation(lengths, answers, budget, most, 1)
    assert batches == plan_validation(lengths, answers, budget, most, 1)
    aside = [i for batch in batches for i in batch]
    assert len(set(aside)) == len(aside) == min(most, len(answers) // 20)
    trained = {i for batch in plan_batches(lengths, answers, budget, 1.0, 0, aside) for i in batch}
    assert trained == set(range(len(answers))) - set(aside)
