"""The estimate is the textbook's where there is one, and a simulation's where there is none."""

from __future__ import annotations

import math
import random

import pytest

from clover_vllm.cluster.sizing import estimate, replicas_for, target_requests

CURVE = {1: 88.0, 2: 102.0, 4: 129.0, 8: 164.0, 16: 189.0}
"""Tokens per second by requests at once, about those of results/bench.json."""


def test_one_server_is_the_queue_of_the_textbook() -> None:
    """M/M/1: 1 / (service rate - arrival rate)."""
    found = estimate({1: 10.0}, tokens=5.0, rate=1.5, most=1)
    assert found.load == pytest.approx(0.75)
    assert found.seconds == pytest.approx(1 / (2.0 - 1.5))
    assert found.waiting == pytest.approx(0.75)


def test_speed_in_proportion_to_requests_is_erlangs_queue() -> None:
    """M/M/c with Erlang's C formula."""
    servers, service, rate = 5, 2.0, 7.0
    offered = rate / service
    last = offered**servers / math.factorial(servers) / (1 - offered / servers)
    erlang = last / (sum(offered**k / math.factorial(k) for k in range(servers)) + last)
    found = estimate({n: 10.0 * n for n in range(1, servers + 1)}, tokens=5.0, rate=rate, most=servers)
    assert found.waiting == pytest.approx(erlang)
    assert found.seconds == pytest.approx(1 / service + erlang / (servers * service - rate))


def simulated(tokens: float, rate: float, most: int, arrivals: int) -> float:
    """Mean seconds of answers of one length, each token shared out as an engine does."""
    rng, now, next_arrival = random.Random(0), 0.0, 0.0
    inside: list[list[float]] = []  # tokens left, arrival
    queue: list[float] = []
    total = done = 0.0
    while done < arrivals:
        speed = 0.0
        if inside:
            below = max(n for n in CURVE if n <= len(inside))
            above = min((n for n in CURVE if n >= len(inside)), default=below)
            share = 0.0 if above == below else (len(inside) - below) / (above - below)
            speed = (CURVE[below] + share * (CURVE[above] - CURVE[below])) / len(inside)
        finish = min((left for left, _ in inside), default=math.inf) / speed if speed else math.inf
        step = min(finish, next_arrival - now)
        now += step
        for own in inside:
            own[0] -= step * speed
        if finish <= step:
            inside.sort()
            total += now - inside.pop(0)[1]
            done += 1
        else:
            queue.append(now)
            next_arrival = now + rng.expovariate(rate)
        while queue and len(inside) < most:
            inside.append([tokens, queue.pop(0)])
    return total / done


def test_a_simulation_with_equal_answers_agrees() -> None:
    """At 0.55 and 0.8 of what a replica can do, though the estimate was made for lengths of any distribution."""
    for rate, tolerance in ((1.04, 0.06), (1.5, 0.12)):
        expected = estimate(CURVE, tokens=100.0, rate=rate, most=16).seconds
        assert simulated(100.0, rate, 16, 12_000) == pytest.approx(expected, rel=tolerance)


def test_replicas_are_as_few_as_the_answer_time_allows() -> None:
    count = replicas_for(CURVE, tokens=100.0, rate=20.0, most=16, seconds=4.0)
    assert estimate(CURVE, 100.0, 20.0 / count, 16).seconds <= 4.0
    assert estimate(CURVE, 100.0, 20.0 / (count - 1), 16).seconds > 4.0
    assert replicas_for(CURVE, 100.0, 20.0, 16, seconds=8.0) < count
    with pytest.raises(ValueError, match="lone request"):
        replicas_for(CURVE, 100.0, 20.0, 16, seconds=1.0)


def test_too_many_requests_have_no_answer_time() -> None:
    assert estimate(CURVE, 100.0, 1.9, 16).seconds == math.inf


def test_the_target_is_where_speculation_ends_to_pay() -> None:
    plain = {1: 50.0, 2: 76.0, 4: 112.0, 8: 154.0, 16: 196.0, 32: 205.0}
    assert target_requests(CURVE, plain) == 8
    assert target_requests(CURVE, plain, pays=1.2) == 2
    assert target_requests({1: 1.0}, {1: 2.0}) == 1
