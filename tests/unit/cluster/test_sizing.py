"""The estimate is the textbook's where there is one, and a simulation's where there is none."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from small import one_sentence
from typer.testing import CliRunner

from clover_vllm.base.errors import UserError
from clover_vllm.cli import app
from clover_vllm.cluster.settings import ReplicasSettings
from clover_vllm.cluster.sizing import estimate, pays_up_to, replicas, replicas_for

CURVE = {1: 88.0, 2: 102.0, 4: 129.0, 8: 164.0, 16: 189.0}
"""Tokens per second by requests at once."""


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
    with pytest.raises(UserError, match="lone request"):
        replicas_for(CURVE, 100.0, 20.0, 16, seconds=1.0)


def test_too_many_requests_have_no_answer_time() -> None:
    assert estimate(CURVE, 100.0, 1.9, 16).seconds == math.inf


def test_speculation_pays_up_to_the_first_load_where_it_does_not() -> None:
    plain = {1: 50.0, 2: 76.0, 4: 112.0, 8: 154.0, 16: 196.0, 32: 205.0}
    assert pays_up_to(CURVE, plain) == 8
    assert pays_up_to(CURVE, plain, pays=1.2) == 2
    assert pays_up_to({1: 1.0}, {1: 2.0}) == 0


def measured(clover: str, ratio: float) -> dict[str, Any]:
    """A file of `clover-vllm bench`, as far as it is read."""
    rows = [
        {"method": method, "concurrency": count, "tokens_per_second": speed * times}
        for method, times in (("plain", 1.0), (clover, ratio))
        for count, speed in CURVE.items()
    ]
    return {"baseline": "plain", "results": rows}


def test_the_command_sizes_by_what_bench_wrote(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    for method, ratio, pays in (
        ("clover", 2.0, "up to 16 requests at once"),
        ("clover-8", 0.9, "at no measured load"),
    ):
        file.write_text(json.dumps(measured(method, ratio)))
        found = replicas(ReplicasSettings(file, tokens=100, rate=20, seconds=4))
        own = {count: speed * ratio for count, speed in CURVE.items()}
        assert found["replicas"] == replicas_for(own, 100, 20, 16, 4)
        assert found["speculation_pays"] == pays
    shown = CliRunner().invoke(app, ["replicas", "--measured", str(file), "--seconds", "1"])
    assert shown.exit_code == 2
    assert "A lone request takes" in shown.output


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON", json.dumps(measured("suffix", 2.0))])
def test_other_files_are_refused_in_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        replicas(ReplicasSettings(file))
    one_sentence(caught.value)
