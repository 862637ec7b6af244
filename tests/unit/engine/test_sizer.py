"""Who is drafted for, and when drafting sleeps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clover_vllm.engine.drafting.ledger import FIRST_REST, TRIAL
from clover_vllm.engine.drafting.sizing import LIFE, LOOK, PROBE_EVERY, RETHINK_EVERY, Sizer, Wanted
from clover_vllm.tree.budget import Floats, Ints
from clover_vllm.tree.costs import Costs, Curve, StepSize
from clover_vllm.tree.forest import Prices, Retrieved


class _Head:
    """Two candidates behind every node, of which the first is likely or not."""

    def __init__(self, likely: float) -> None:
        self._row = np.array([likely, likely - 3.0]), np.array([7, 8])

    def first(self) -> tuple[Floats, Ints]:
        return self._row[0][None], self._row[1][None]

    def expand(self, parents: Ints, tokens: Ints) -> tuple[Floats, Ints]:
        return np.tile(self._row[0], (len(tokens), 1)), np.tile(self._row[1], (len(tokens), 1))


def _sizer(per_row: float, reading: float = 0.01) -> Sizer:
    """Where a step costs 10 ms and `per_row` for each row, and the head half a millisecond."""
    rows = {float(r): 10.0 + per_row * r for r in (1, 64, 512)}
    augment = {float(r): 0.2 + reading * r for r in (1, 512)}
    flat = {1.0: 0.15, 64.0: 0.3}
    none = {1.0: 0.0, 64.0: 0.0}
    made = Costs(Curve(rows), Curve(none), Curve(augment), Curve(flat), Curve(flat), cached=0.0, crossed=0.0)
    return Sizer(made, 8)


def _wanted(count: int, pending: int | None = 1, room: int = 100) -> list[Wanted]:
    return [Wanted(r, room, 50, pending, sampled=False) for r in range(count)]


def _step(sizer: Sizer, wanted: Sequence[Wanted], likely: float = -0.2) -> list[int]:
    """One step: who is asked for, after which the head answers."""
    forest, prices = sizer.forest(wanted), sizer.prices(wanted, len(wanted), 0, 0)
    places = sizer.choose(wanted, forest, prices)
    for place in places[:1]:
        free = Prices(prices.sampling, prices.of_nodes, lambda _: 0.0)
        forest.grow_head(_Head(likely), [place], free, sizer.following, 3)
        sizer.learn_draft(forest, [place], 1, 0.1)
    return places


def _after(sizer: Sizer, wanted: Sequence[Wanted], steps: int, likely: float = -0.2) -> list[int]:
    return [len(_step(sizer, wanted, likely)) for _ in range(steps)]


def test_all_are_drafted_for_while_rows_cost_little() -> None:
    sizer = _sizer(per_row=0.05)
    assert _after(sizer, _wanted(12), LOOK + 30)[-10:] == [12] * 10
    assert not sizer.asleep


def test_sleeps_where_rows_cost_what_tokens_earn_and_probes_one_request() -> None:
    sizer = _sizer(per_row=8.0)
    asked = _after(sizer, _wanted(12), LOOK + 3 * PROBE_EVERY)[LOOK + 1 :]
    assert sizer.asleep
    assert set(asked) == {0, 1}
    assert 2 <= sum(asked) <= 4


def test_sleeps_where_the_head_knows_nothing_and_wakes_for_few_requests() -> None:
    sizer = _sizer(per_row=2.0)
    _after(sizer, _wanted(32), LOOK + 60)
    assert sizer.asleep
    assert _after(sizer, _wanted(1), 40)[-10:] == [1] * 10
    assert not sizer.asleep
    _after(sizer, _wanted(1), 200, likely=-6.0)
    assert sizer.asleep


def test_rests_between_decisions_and_probes_while_asleep() -> None:
    sizer = _sizer(per_row=8.0)
    _after(sizer, _wanted(12), LOOK + 60)
    assert sizer.asleep
    rested = probed = 0
    for _ in range(2 * PROBE_EVERY):
        if sizer.rests(12):
            rested += 1
        else:
            probed += len(_step(sizer, _wanted(12)))
    assert rested > 1.8 * PROBE_EVERY
    assert probed == 2
    assert not sizer.rests(6)  # another load is thought about at once


def test_what_was_retrieved_is_not_the_heads_merit() -> None:
    """A head that adds nothing to what is found in the text is not asked for."""
    sizer = _sizer(per_row=0.5)
    for _ in range(LOOK + 60):
        wanted = _wanted(12)
        forest, prices = sizer.forest(wanted), sizer.prices(wanted, 12, 0, 0)
        forest.retrieve({i: Retrieved([7, 8], [-1, 0], [0.9, 0.8], 16) for i in range(12)})
        prices.spent = 0.5
        places = sizer.choose(wanted, forest, prices)
        if places:
            forest.grow_head(_Head(-6.0), places[:1], prices, sizer.following, 3)
            sizer.learn_draft(forest, places[:1], 1, 0.1)
    assert sizer.asleep


def test_decides_nothing_before_it_has_seen_a_draft() -> None:
    """Requests that end before the head has read their long prompts leave no draft behind."""
    sizer = _sizer(per_row=0.05)
    wanted = _wanted(12)
    for _ in range(LOOK + 40):
        assert sizer.choose(wanted, sizer.forest(wanted), sizer.prices(wanted, 12, 0, 0)) == [*range(8)]


def test_asking_that_leaves_no_draft_behind_ends() -> None:
    sizer = _sizer(per_row=0.05)
    wanted, size = _wanted(12), StepSize(12, 12, 600)
    asked = 0
    for _ in range(LOOK + TRIAL + PROBE_EVERY):
        if not sizer.rests(12):
            asked = len(sizer.choose(wanted, sizer.forest(wanted), sizer.prices(wanted, 12, 0, 0)))
            sizer.settle(sizer.ledger, 12, size, 12, 0, 0, 1.0)
    assert sizer.asleep
    assert asked <= 1


def test_asking_begins_anew_when_the_ledgers_rest_has_ended() -> None:
    """Also where no probe has left a draft."""
    sizer = _sizer(per_row=0.05)
    wanted, size = _wanted(12), StepSize(12, 12, 600)
    asked = []
    for _ in range(LOOK + TRIAL + FIRST_REST + 2 * RETHINK_EVERY):
        if sizer.rests(12):
            asked.append(0)
            continue
        asked.append(len(sizer.choose(wanted, sizer.forest(wanted), sizer.prices(wanted, 12, 0, 0))))
        if len(asked) < LOOK + TRIAL + 10:
            sizer.settle(sizer.ledger, 12, size, 12, 0, 0, 1.0)
    assert 0 in asked
    assert asked[-1] == 8


def test_a_request_that_the_head_cannot_read_so_far_is_not_asked_for() -> None:
    sizer = _sizer(per_row=0.05)
    _after(sizer, _wanted(4), LOOK + 10)
    lost = [*_wanted(3), Wanted(3, 100, 50, None, sampled=False)]
    assert _step(sizer, lost) == [0, 1, 2]
    assert _step(sizer, _wanted(2, pending=None)) == []


def test_long_texts_are_read_only_for_requests_that_go_on() -> None:
    sizer = _sizer(per_row=0.05, reading=0.05)
    _after(sizer, _wanted(2), LOOK + 20)
    enough = int(sizer.saved * LIFE / 2 / 0.05)
    assert enough > 20
    assert _step(sizer, _wanted(2, pending=enough // 2)) == [0, 1]
    assert _step(sizer, _wanted(2, pending=enough * 2)) == []
    assert _step(sizer, _wanted(2, pending=enough // 2, room=2)) == []
