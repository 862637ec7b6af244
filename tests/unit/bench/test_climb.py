"""What a climbing load is made of, and how its steps become a table."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from clover_vllm.bench.climb import WINDOW, by_second, phase_rows, phases_of, rate, table, window_ratios
from clover_vllm.bench.worker import Moment


def moments(seconds: float, tokens: int, nodes: int = 0, asleep: bool = False) -> list[Moment]:
    """Four steps a second that give `tokens` each."""
    return [Moment((i + 1) / 4, 1, tokens, nodes, asleep) for i in range(int(4 * seconds))]


def test_the_load_doubles_to_the_highest_power_of_two_and_halves_again() -> None:
    assert phases_of(1) == [1]
    assert phases_of(2) == [1, 2, 1]
    assert phases_of(8) == phases_of(15) == [1, 2, 4, 8, 4, 2, 1]


def test_tokens_of_a_step_come_evenly_while_it_runs() -> None:
    steps = [Moment(0.5, 1, 3, 0, False), Moment(1.5, 1, 8, 0, False), Moment(2.0, 1, 7, 0, False)]
    assert rate(steps, 0.0, 0.5) == 6.0
    assert rate(steps, 0.0, 1.0) == 3.0 + 4.0
    assert rate(steps, 1.0, 2.0) == 4.0 + 7.0
    assert rate(steps, 0.0, 4.0) == 18.0 / 4.0
    assert rate([], 0.0, 1.0) == 0.0


def test_rows_are_means_over_repetitions_by_phase() -> None:
    """Three phases of two seconds; in the last clover sleeps."""
    plain = [moments(6.0, 1), moments(6.0, 3)]
    fast = [*moments(4.0, 4, nodes=6), *(m for m in moments(6.0, 2, asleep=True) if m.second > 4.0)]
    rows = phase_rows(plain, [fast, fast], [1, 2, 1], 2.0)
    assert [row["running"] for row in rows] == [1, 2, 1]
    assert [row["plain"] for row in rows] == [8.0, 8.0, 8.0]
    assert [row["clover"] for row in rows] == [16.0, 16.0, 8.0]
    assert [row["ratio"] for row in rows] == [2.0, 2.0, 1.0]
    assert [row["nodes_per_step"] for row in rows] == [6.0, 6.0, 0.0]
    assert [row["asleep"] for row in rows] == [0.0, 0.0, 1.0]


def test_windows_show_a_slow_stretch_that_phases_hide() -> None:
    plain = [moments(3 * WINDOW, 2)]
    slow = [Moment(m.second, 1, 1 if WINDOW < m.second <= 2 * WINDOW else 4, 0, False) for m in plain[0]]
    assert window_ratios(plain, [slow], 3 * WINDOW) == [2.0, 0.5, 2.0]


@pytest.mark.parametrize("seconds", [0.5, 1.0, WINDOW - 1])
def test_a_climb_shorter_than_a_window_is_one_window(seconds: float) -> None:
    assert window_ratios([moments(seconds, 2)], [moments(seconds, 3)], seconds) == [1.5]


def test_a_phase_without_a_step_is_no_division_by_zero() -> None:
    """A machine so slow that one step outlasts a phase."""
    late = [Moment(3.5, 1, 8, 2, False)]
    rows = phase_rows([late], [late], [1, 2], 2.0)
    assert rows[0]["ratio"] == 1.0
    assert rows[0]["nodes_per_step"] == 0.0
    assert rows[1]["ratio"] == 1.0
    assert window_ratios([[]], [[]], WINDOW) == [1.0]


def test_seconds_are_those_of_all_runs() -> None:
    found = by_second([moments(2.0, 1, nodes=2), moments(3.0, 3, nodes=4, asleep=True)])
    assert [row["tokens"] for row in found] == [8.0, 8.0, 6.0]
    assert [row["nodes_per_step"] for row in found] == [3.0, 3.0, 4.0]
    assert [row["asleep"] for row in found] == [0.5, 0.5, 1.0]
    assert by_second([[]]) == []


def test_the_table_names_the_slowest_window() -> None:
    rows = phase_rows([moments(2.0, 2)], [moments(2.0, 3)], [1, 2], 1.0)
    text = io.StringIO()
    Console(file=text, width=120).print(table(rows, [1.5, 0.93]))
    assert "0.93 of plain" in " ".join(text.getvalue().split())
    assert "1.50" in text.getvalue()
