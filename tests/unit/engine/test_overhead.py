"""The benchmark of speculation's own Python drafts, verifies and sleeps as an engine does."""

from __future__ import annotations

import random
import sys
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

from clover_vllm.engine import overhead
from clover_vllm.engine.overhead import PARTS, time_overhead
from clover_vllm.tree.forest import Retrieved


@pytest.mark.parametrize("drafts", [True, False])
def test_every_part_is_timed(drafts: bool) -> None:
    found = time_overhead(requests=8, drafts=drafts, steps=100)
    needless = set() if drafts else {"score", "read"}
    assert all(found.parts[part] > 0 for part in PARTS if part not in needless)
    assert (found.nodes > 1) == drafts
    assert (found.accepted > 0.3) == drafts
    assert (found.catch_up > 0) != drafts


def test_looking_in_vain_is_no_loss_of_nodes_that_were_never_verified() -> None:
    """Whether looks pay is for one judge; the other would rest after some dozen of them, for hundreds of steps."""
    with overhead.warm_stand(2, drafts=True) as stand:
        sizer = stand.runner.speculation.sizer
        assert stand.runner.speculation.retrieval is not None
        for _ in range(200):
            stand.step()
        assert all(sizer.looks(2) for _ in range(10))
        assert all(not account.steps for account in sizer.found._accounts.values())
        assert any(account.steps for account in sizer.ledger._accounts.values())


def test_retrieved_nodes_that_are_wrong_are_booked_as_a_loss() -> None:
    with overhead.warm_stand(2, drafts=True) as stand:
        speculation = stand.runner.speculation
        wrong = Retrieved([1, 1, 1], [-1, 0, 1], [0.98, 0.96, 0.94], match=9)
        speculation.retrieval = SimpleNamespace(look_up=lambda *_: wrong, forget=lambda _: None)
        for _ in range(20):
            stand.step()
        (account,) = speculation.sizer.found._accounts.values()
        assert account.resting > 200
        assert not speculation.sizer.looks(2)
        assert not any(own.resting for own in speculation.sizer.ledger._accounts.values())


def test_asleep_a_look_that_finds_nothing_reckons_no_prices() -> None:
    with overhead.warm_stand(2, drafts=False) as stand:
        speculation, looks = stand.runner.speculation, list[str]()
        reckoned: list[Any] = []
        sizer = speculation.sizer
        assert sizer.asleep
        prices = sizer.prices
        speculation.retrieval = SimpleNamespace(
            look_up=lambda name, *_: looks.append(name), forget=lambda _: None
        )

        def count(*given: Any) -> Any:
            reckoned.append(prices(*given))
            return reckoned[-1]

        sizer.looks, sizer.prices = lambda _: True, count
        for _ in range(48):
            stand.step()
        assert len(looks) == 2 * 48
        assert 0 < len(reckoned) < 8  # to decide anew, and for probes


@pytest.mark.parametrize(("drafts", "most"), [(True, 200), (False, 30)])
def test_a_further_request_costs_few_calls(drafts: bool, most: int) -> None:
    """What Python does per request and step, counted, since no test asserts a time. A loop over nodes that calls something would show."""
    steps, scripted = 20, (overhead.__file__, random.__file__)

    def calls(requests: int) -> float:
        count = 0

        def see(frame: FrameType, event: str, _: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call") and frame.f_code.co_filename not in scripted

        with overhead.warm_stand(requests, drafts) as stand:
            stand.runner.speculation.retrieval = (
                None  # how often texts are looked up depends on the time it takes
            )
            sys.setprofile(see)
            try:
                for _ in range(steps):
                    stand.step()
            finally:
                sys.setprofile(None)
        return count / steps

    few, many = 16, 64
    assert (calls(many) - calls(few)) / (many - few) < most
