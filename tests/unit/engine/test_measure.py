"""Costs that start-up times have the machine's form, not that of a moment in which it was slow."""

from __future__ import annotations

from itertools import count

import pytest

from clover_vllm.engine.drafting import measure


def test_a_slow_moment_does_not_bend_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = count()
    monkeypatch.setattr(measure, "agree", lambda value: value)
    monkeypatch.setattr(measure, "_time", lambda run, _: run() * (3.0 if 2 <= next(timed) < 6 else 1.0))
    found = measure._times("forward", (1, 2, 4, 8, 16, 32), 16, lambda size: lambda: float(size))
    assert found == {size: float(size) for size in (1, 2, 4, 8, 16)}


def test_sizes_for_which_no_time_is_left_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "agree", lambda value: value)
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    runs: list[int] = []
    found = measure._times("logits", (1, 2, 4, 8), 64, lambda size: lambda: runs.append(size))
    assert [*found] == [1, 2]
    assert runs.count(1) == 1 + measure.LEAST_ROUNDS  # once to warm up
