"""Chances of acceptance are learnt from outcomes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from clover_vllm.tree.calibration import AT_ONCE, CLAMP, WINDOW, Calibration, log_odds

STEP = 128
"""Outcomes of a step."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


@pytest.mark.parametrize("slope", [0.4, 1.0, 1.6])
def test_it_finds_slope_and_intercepts(slope: float) -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0.7, -0.5, -2.0])
    calibration = Calibration(3)
    for _ in range(150):
        odds, kinds = rng.normal(0.0, 2.0, STEP), rng.integers(0, 3, STEP)
        accepted = rng.random(STEP) < sigmoid(slope * odds + truth[kinds])
        calibration.learn(odds, kinds, accepted)
    assert calibration.slope == pytest.approx(slope, abs=0.12)
    assert calibration.intercepts == pytest.approx(truth, abs=0.35)


def test_a_kind_without_outcomes_stays_where_it_began() -> None:
    calibration = Calibration(2, np.array([0.0, -1.5]))
    rng = np.random.default_rng(1)
    for _ in range(20):
        odds = rng.normal(0.0, 1.0, STEP)
        accepted = rng.random(STEP) < sigmoid(odds)
        calibration.learn(odds, np.zeros(STEP, dtype=np.int64), accepted)
    assert calibration.intercepts[1] == pytest.approx(-1.5)


def test_it_follows_a_change_and_never_leaves_its_bounds() -> None:
    calibration = Calibration(1)
    zeros, kinds = np.zeros(STEP), np.zeros(STEP, dtype=np.int64)
    for accepted in (1.0, 0.0):
        for _ in range(200):
            calibration.learn(zeros, kinds, np.full(STEP, accepted > 0))
        found = calibration(zeros[:1], kinds[:1])[0]
        assert abs(found - accepted) < 0.05
        assert 0.05 <= calibration.slope <= 3.0


def test_certainties_are_clamped() -> None:
    found = log_odds(np.array([0.0, -math.inf, math.log(0.5), math.nan, -1e-13, -900.0, 1e-9]))
    assert found == pytest.approx([CLAMP, -CLAMP, 0.0, -CLAMP, CLAMP, -CLAMP, CLAMP])


def test_of_a_step_with_many_outcomes_a_part_is_kept_from_all_over_it() -> None:
    calibration = Calibration(2)
    kinds = np.repeat([0, 1], 10 * AT_ONCE)
    for _ in range(2 * WINDOW // AT_ONCE):
        calibration.learn(np.zeros(len(kinds)), kinds, kinds == 1)
    assert calibration(np.zeros(2), np.arange(2)) == pytest.approx([0.0, 1.0], abs=0.05)
    assert calibration._seen <= 2 * WINDOW
