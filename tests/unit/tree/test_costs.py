"""Costs of steps: monotone, learnt, kept."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clover_vllm.tree.costs import GRID, Costs, Curve, StepSize


def costs() -> Costs:
    def curve(a: float, b: float) -> Curve:
        return Curve({1.0: a + b, 64.0: a + 64 * b})

    return Costs(
        curve(10.0, 0.5), curve(0.5, 0.1), curve(1.0, 0.02), curve(0.5, 0.02), curve(0.6, 0.03), 1e-3, 2e-4
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9000), st.floats(-50.0, 50.0)), max_size=40))
def test_a_curve_never_falls_whatever_it_learns(surprises: list[tuple[int, float]]) -> None:
    curve = Curve({1.0: 5.0, 8.0: 4.0, 64.0: 30.0})
    for rows, surprise in surprises:
        curve.learn(rows, surprise)
    found = curve(np.arange(0.0, 10000.0, 7.0))
    assert (np.diff(found) >= -1e-9).all()
    assert (found > 0).all()


def test_a_curve_is_straight_between_and_behind_its_points() -> None:
    curve = Curve({1.0: 10.0, 64.0: 73.0})
    assert curve.at(1) == pytest.approx(10.0)
    assert curve.at(32) == pytest.approx(41.0)
    assert curve.at(GRID[-1] * 2) == pytest.approx(9.0 + 2 * GRID[-1])


def test_steps_teach_the_shape_and_a_slower_machine_its_speed() -> None:
    found, rng = costs(), np.random.default_rng(0)

    def truth(size: StepSize) -> float:
        return 2.0 * (8.0 + 0.9 * size.rows + 0.1 * size.sampled + 3e-3 * size.cached)

    def draw() -> StepSize:
        rows = int(rng.integers(1, 64))
        return StepSize(rows, rows, int(rng.integers(100, 8000)))

    for _ in range(3000):
        size = draw()
        found.learn_step(size, truth(size) * float(rng.normal(1.0, 0.03)))
    sizes = [draw() for _ in range(200)]
    errors = [abs(found.of_step(size) - truth(size)) / truth(size) for size in sizes]
    assert np.median(errors) < 0.1


def test_a_machine_whose_speed_wanders_does_not_bend_the_curves() -> None:
    """Few and many rows by turns, as where drafting comes and goes, on a machine that is now faster and now slower."""
    found, rng = costs(), np.random.default_rng(0)
    few, many = StepSize(8, 8, 3000), StepSize(48, 48, 3000, 1500.0)
    ratio = found.of_step(many) / found.of_step(few)
    true = costs()
    for step in range(4000):
        size = many if step // 100 % 2 else few
        speed = 1.5 + 0.5 * math.sin(step / 130.0)
        found.learn_step(size, speed * true.of_step(size) * float(rng.normal(1.0, 0.05)))
    assert found.of_step(many) / found.of_step(few) == pytest.approx(ratio, rel=0.15)


def test_short_prompts_in_a_step_say_nothing_of_decoding() -> None:
    found, size = costs(), StepSize(40, 40, 400)
    before = found.of_step(size)
    for _ in range(100):
        found.learn_step(StepSize(60, 8, 400), 3.0 * before)
    assert found.of_step(size) == before


def test_a_hiccup_and_a_pause_are_no_costs() -> None:
    found = costs()
    size = StepSize(4, 4, 400)
    before, outside = found.of_step(size), found.outside
    found.learn_step(size, 5000.0)
    found.learn_outside(10_000.0)
    assert found.of_step(size) < 1.2 * before
    assert found.outside == outside


def test_costs_of_nodes_are_those_of_steps() -> None:
    found, size = costs(), StepSize(5, 4, 400)
    nodes = found.of_nodes(size, 6, 100.0)
    assert len(nodes) == 7
    for count in range(7):
        step = StepSize(5 + count, 4 + count, 400, count * 100.0)
        assert nodes[count] == pytest.approx(found.of_step(step) + found.outside)


def test_costs_are_kept_and_damage_is_noticed() -> None:
    found = costs()
    found.learn_step(StepSize(3, 3, 100), 30.0)
    again = Costs.from_json(json.loads(json.dumps(found.to_json())))
    assert again.of_step(StepSize(7, 7, 50)) == pytest.approx(
        found.of_step(StepSize(7, 7, 50)) / found.speed, rel=0.2
    )
    with pytest.raises((KeyError, TypeError, ValueError)):
        Costs.from_json({"curves": {}})
    with pytest.raises(ValueError, match="not a number"):
        Costs.from_json({**found.to_json(), "cached": math.nan})


@pytest.mark.parametrize("part", ["augment", "first", "level"])
def test_drafting_is_learnt_apart_from_steps(part: str) -> None:
    """Each part from its own times, relative to the machine's speed; a hiccup moves it little."""
    found, size = costs(), StepSize(4, 4, 400)
    step = found.of_step(size)
    of_part = {"augment": found.of_augmenting, "first": found.of_first, "level": found.of_level}
    others = {name: cost(8) for name, cost in of_part.items() if name != part}
    for _ in range(100):
        found.learn_drafting(part, 8, 3.0)
    assert of_part[part](8) == pytest.approx(3.0, rel=0.05)
    found.learn_drafting(part, 8, 1000.0)
    assert of_part[part](8) < 1.3 * 3.0
    assert found.of_step(size) == step
    assert all(of_part[name](8) == cost for name, cost in others.items())


def test_on_a_machine_that_slows_down_drafting_is_dearer_too() -> None:
    found, size = costs(), StepSize(4, 4, 400)
    step, level = found.of_step(size), found.of_level(4)
    for _ in range(200):
        found.learn_step(size, 3.0 * step)
    assert found.of_step(size) == pytest.approx(3.0 * step, rel=0.05)
    assert found.of_level(4) > 1.5 * level


def test_more_nodes_and_longer_contexts_never_cost_less() -> None:
    found = costs()
    for size in (StepSize(1, 1, 10), StepSize(60, 16, 9000), StepSize(2048, 3, 100)):
        near, far = found.of_nodes(size, 64, 10.0), found.of_nodes(size, 64, 5000.0)
        assert (np.diff(near) >= 0).all()
        assert (far >= near).all()
        assert far[0] == near[0]
