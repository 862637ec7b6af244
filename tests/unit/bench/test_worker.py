"""A run of requests on an engine that is played: what is timed, what counts as decoding."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from clover_vllm.bench import worker
from clover_vllm.bench.through_llm import BenchEngine
from clover_vllm.bench.worker import TURN, Clock, Run, is_prefilling, run_phases, run_requests, serve

CHUNK = 4
"""Prompt tokens that the played scheduler computes per step and request."""


class PlayedRunner:
    def execute_model(self) -> None: ...


class Played:
    """Stands for vllm.LLM: chunks of prompts, then a token per step; a step takes a second."""

    def __init__(self, clock: list[float], asynchronous: bool = False) -> None:
        self.clock = clock
        self.requests: dict[str, Any] = {}
        self.drafting = 0.0  # seconds of a step after its outputs are there
        self.reading = 0.0  # more seconds of one that reads a prompt
        self.batches: list[int] = []
        worker = SimpleNamespace(worker=SimpleNamespace(model_runner=PlayedRunner()))
        core = SimpleNamespace(
            scheduler=SimpleNamespace(requests=self.requests),
            batch_queue=[] if asynchronous else None,
            model_executor=SimpleNamespace(driver_worker=worker),
            post_step=lambda _: None,
        )
        self.llm_engine = self
        self.engine_core = SimpleNamespace(engine_core=core)

    def reset_prefix_cache(self) -> None:
        assert not self.requests

    def get_metrics(self) -> list[Any]:
        return []

    def add_request(self, name: str, prompt: Any, params: Any, **_: Any) -> None:
        self.requests[name] = SimpleNamespace(
            num_computed_tokens=0, num_prompt_tokens=len(prompt["prompt_token_ids"]), left=params.max_tokens
        )

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.requests[name]

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Any]:
        self.clock[0] += 1
        if any(own.num_computed_tokens < own.num_prompt_tokens for own in self.requests.values()):
            self.clock[0] += self.reading
        self.engine_core.engine_core.post_step(True)
        self.clock[0] += self.drafting
        self.batches.append(len(self.requests))
        outputs = []
        for name, request in list(self.requests.items()):
            room = request.num_prompt_tokens - request.num_computed_tokens
            request.num_computed_tokens += max(min(room, CHUNK), 1)
            if request.num_computed_tokens < request.num_prompt_tokens:
                continue
            request.left -= 1
            if not request.left:
                del self.requests[name]
            outputs.append(
                SimpleNamespace(
                    request_id=name, finished=not request.left, outputs=[SimpleNamespace(token_ids=[7])]
                )
            )
        return outputs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(worker, "_parts", lambda _: {})
    return now


def request(prompt: int, tokens: int) -> dict[str, Any]:
    return {"prompt": [1] * prompt, "params": {"max_tokens": tokens}}


def test_a_step_that_continues_a_prompt_is_no_decode_step(clock: list[float]) -> None:
    run = run_requests(Played(clock), [request(1, 1), request(3 * CHUNK, 6)], 1)
    assert run.steps == 8  # three chunks, the last of which gives a token, then five tokens
    assert run.decode_steps == 5
    assert run.decode_seconds == 5.0


def test_under_async_scheduling_the_step_behind_a_prompt_is_none_either(clock: list[float]) -> None:
    run = run_requests(Played(clock, asynchronous=True), [request(1, 1), request(3 * CHUNK, 6)], 1)
    assert run.decode_steps == 4


def test_the_clock_runs_while_every_place_is_taken_by_a_later_request(clock: list[float]) -> None:
    """Two at a time: the first ends after 2 s of its 4, the second at 4 s; the last begins at 8 s, when no other waits."""
    engine = Played(clock)
    run = run_requests(engine, [request(1, 4) for _ in range(6)], 2)
    assert run.seconds == 6.0  # from 4 s to 10 s
    assert run.tokens == 2 + 4 + 4 + 2
    assert set(engine.batches[:10]) == {2}
    assert [len(tokens) for tokens in run.outputs] == [2, 4, 4, 4, 4, 4]
    assert run.tpot == [1.0] * 4
    assert run.ttft == [1.0] * 3  # of those that began meanwhile


def test_a_window_that_cuts_answers_is_evened_out() -> None:
    """Ten answers of 100 tokens were begun, and 900 tokens came; where only decoding is done, 50 come in a second."""
    run = Run(seconds=40.0, tokens=900, answered=1000, decode_seconds=10.0, decode_tokens=500)
    assert run.rate == 1000 / 42.0
    assert replace(run, tokens=1100).rate == 1000 / 38.0
    assert replace(run, tokens=1000).rate == 1000 / 40.0
    # With prompts in every step, or a single slow one without, it is the speed of the whole.
    for price in ((0.0, 0), (5.0, 1)):
        assert replace(run, decode_seconds=price[0], decode_tokens=price[1]).rate == pytest.approx(900 / 40.0)
    assert replace(run, tokens=4000, answered=100, decode_tokens=1).rate > 0
    assert replace(run, answered=0).rate == 900 / 40.0  # not known
    assert replace(run, tokens=0).rate == 0.0


def test_answers_count_whole_that_begin_while_the_clock_runs(clock: list[float]) -> None:
    """Two places; the clock runs from 4 s to 10 s. Answers begin at 4 s, 6 s and 8 s, and of the third two tokens come too
    late: as many as come of one that began before."""
    run = run_requests(Played(clock), [request(1, 4) for _ in range(6)], 2)
    assert run.answered == 3 * 4
    assert run.rate == run.tokens / run.seconds
    longer = [request(1, 4) for _ in range(5)] + [request(1, 40)]
    run = run_requests(Played(clock), longer, 2)
    assert (run.tokens, run.answered) == (12, 4 + 4 + 40)
    assert (run.decode_seconds, run.decode_tokens) == (3.0, 6)
    engine = Played(clock)
    engine.reading = 1.0
    run = run_requests(engine, longer, 2)
    assert (run.seconds, run.tokens, run.answered) == (9.0, 12, 48)
    assert run.rate == 48 / (9.0 + 36 * 3.0 / 6)


def test_one_at_a_time_is_timed_from_the_second_to_the_end(clock: list[float]) -> None:
    run = run_requests(Played(clock), [request(1, 2), request(1, 3), request(1, 4)], 1)
    assert (run.seconds, run.tokens) == (7.0, 7)
    assert run.ttft == [1.0, 1.0]


def test_a_token_is_there_before_the_next_draft_is_made(clock: list[float]) -> None:
    engine = Played(clock)
    engine.drafting = 0.5
    run = run_requests(engine, [request(1, 2), request(1, 3), request(1, 4)], 1)
    assert run.ttft == [1.5, 1.5]  # who asks again waits for the draft behind the answer before
    assert run.seconds == 7 * 1.5


def test_the_clock_stands_still_while_others_have_their_turn(clock: list[float]) -> None:
    waits = []

    def wait() -> None:
        waits.append(clock[0])
        clock[0] += 100.0

    requests = [request(1, 4) for _ in range(6)]
    run = run_requests(Played(clock), requests, 2, clock=Clock(wait))
    clock[0] = 0.0
    assert run.seconds == 6.0
    assert run == run_requests(Played(clock), requests, 2)
    assert waits[0] == TURN
    assert len(waits) > 2


def test_a_load_that_changes_has_as_many_requests_as_its_phase_whoever_has_a_turn(clock: list[float]) -> None:
    def wait() -> None:
        clock[0] += 100.0

    for paused in (None, wait):
        clock[0] = 0.0
        engine = Played(clock)
        moments = run_phases(engine, [request(1, 3), request(1, 50)], [1, 2, 1], 4.0, Clock(paused))
        assert engine.batches == [1] * 4 + [2] * 4 + [1] * 4
        assert [m.running for m in moments] == engine.batches
        assert [m.second for m in moments] == [float(i + 1) for i in range(12)]
        assert [m.tokens for m in moments] == engine.batches
        assert not engine.requests


def test_an_engine_ends_when_nobody_gives_it_another_turn(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.LLM", lambda **_: Played(clock))
    said: list[dict[str, Any]] = []
    run = {"requests": [request(1, 9), request(1, 9)], "concurrency": 1}
    parent: Any = SimpleNamespace(commands=lambda: iter([{"llm": {}}, run]), say=said.append)
    with pytest.raises(SystemExit):
        serve(parent)
    assert said == [{"ready": True}, {"turn": "over"}]


def test_the_first_run_of_hindsight_is_a_turn_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    over, run = {"turn": "over"}, asdict(Run(seconds=1.0, outputs=[[7]]))
    answers, asked = [over, run, over, run], []

    def ask(_: Any, command: dict[str, Any]) -> dict[str, Any]:
        asked.append(command)
        return answers.pop(0)

    monkeypatch.setattr(BenchEngine, "ask", ask)
    engine = BenchEngine.__new__(BenchEngine)
    engine._in_hindsight = True
    assert list(engine.turns([request(1, 1)], 1)) == [None, Run(**run)]
    assert [command.get("known") for command in asked] == [None, None, [[7]], None]


def test_preempted_requests_are_prefilled_again() -> None:
    again = SimpleNamespace(num_computed_tokens=0, num_prompt_tokens=3)
    decoding = SimpleNamespace(num_computed_tokens=9, num_prompt_tokens=3)
    assert is_prefilling(SimpleNamespace(requests={"a": decoding, "b": again}))
    assert not is_prefilling(SimpleNamespace(requests={"a": decoding}))
