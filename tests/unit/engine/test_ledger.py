"""Drafting rests where it has lost, and comes back."""

from __future__ import annotations

from clover_vllm.engine.drafting.ledger import (
    EARLY,
    FIRST_REST,
    LONGEST_REST,
    RETRIEVE_EVERY,
    TRIAL,
    Habit,
    Ledger,
)


def _rest(ledger: Ledger, requests: int) -> int:
    """Steps until drafting is allowed."""
    return next(steps for steps in range(10 * LONGEST_REST) if not ledger.forbids(requests))


def _run(ledger: Ledger, requests: int, steps: int, spent: float, saved: float) -> None:
    for _ in range(steps):
        ledger.record(requests, spent, saved)


def test_gains_are_not_forbidden() -> None:
    ledger = Ledger()
    _run(ledger, 4, 1000, spent=1.0, saved=1.2)
    assert not ledger.forbids(4)


def test_losses_rest_longer_each_time_at_that_load_alone() -> None:
    ledger = Ledger()
    rests = []
    for _ in range(8):
        _run(ledger, 16, TRIAL, spent=1.0, saved=0.9)
        assert not ledger.forbids(4)
        rests.append(_rest(ledger, 16))
    assert rests[:3] == [FIRST_REST - 1, 2 * FIRST_REST - 1, 4 * FIRST_REST - 1]
    assert rests[-1] == LONGEST_REST - 1


def test_a_load_that_is_new_rests_with_the_next_smaller_one() -> None:
    ledger = Ledger()
    for _ in range(3):
        _rest(ledger, 4)
        _run(ledger, 4, TRIAL, spent=1.0, saved=0.9)  # rests longer now than anybody who has not lost
    assert _rest(ledger, 6) == FIRST_REST - 1
    assert not any(map(ledger.forbids, (2, 3, 16)))
    _run(ledger, 6, TRIAL, spent=1.0, saved=1.1)
    assert not ledger.forbids(6)
    assert ledger.forbids(4)


def test_a_clear_loss_is_judged_early_and_an_unclear_one_is_not() -> None:
    clear, unclear = Ledger(), Ledger()
    _run(clear, 16, EARLY, spent=1.0, saved=0.5)
    for step in range(TRIAL - 1):
        unclear.record(16, spent=1.0, saved=0.0 if step % 3 else 2.7)
        assert not unclear.forbids(16)
    assert clear.forbids(16)


def test_gains_shorten_the_next_rest() -> None:
    ledger = Ledger()
    _run(ledger, 16, TRIAL, spent=1.0, saved=0.5)
    _rest(ledger, 16)
    _run(ledger, 16, 5 * TRIAL, spent=1.0, saved=2.0)
    _run(ledger, 16, TRIAL // 2, spent=10.0, saved=0.0)
    assert _rest(ledger, 16) == FIRST_REST - 1


def test_a_short_loss_among_gains_is_forgiven() -> None:
    ledger = Ledger()
    _run(ledger, 8, 100, spent=1.0, saved=2.0)
    _run(ledger, 8, 10, spent=1.0, saved=0.0)
    assert not ledger.forbids(8)


def test_a_text_without_repetitions_does_not_end_looking_in_those_that_follow() -> None:
    """One text in ten repeats itself. A look takes 0.02 ms; a hit saves 5 ms."""
    habit = Habit()
    for step in range(4000):
        assert habit.due()
        habit.learn(5.0 if step // 100 % 10 == 0 and step % 2 else 0.0, 0.02, 1)


def test_looking_rests_where_nothing_is_ever_found_and_comes_back() -> None:
    habit = Habit()
    steps = 0
    while not habit.resting:
        habit.learn(0.0, 0.02, 32)
        steps += 1
    assert steps < 200
    assert sum(habit.due() for _ in range(10 * RETRIEVE_EVERY)) == 10
    for _ in range(40):
        habit.learn(5.0, 0.02, 1)
    assert not habit.resting
    before = habit.saved
    habit.learn(0.0, 0.02, 10_000)
    assert 0.9 * before < habit.saved < before
