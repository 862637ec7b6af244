"""Under Ray no request and no line is lost when replicas, engines and actors die. Engines are stand-ins here, so that it
takes seconds; what Ray, the ingress, the servers and the batch do is real."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from engines import Json, run_script
from stand_ins import answer_to

from clover_vllm.cluster.ingress import LOST

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Json:
    paths = [str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(paths)}
    folder = tmp_path_factory.mktemp("ray")
    found: Json = run_script("run_ray", {"folder": str(folder)}, timeout=400, env=env)
    return found


def test_a_batch_answers_each_line_once_though_actors_die(seen: Json) -> None:
    assert [line for line, _ in seen["batch"]] == list(range(1, 201))
    assert [name for _, name in seen["batch"]][69] == "fatal70"
    assert seen["batch_distinct"] == 200
    assert (
        200 < seen["batch_asked"] < 200 + 3 * 32 + 1
    )  # a block again for each death, or those under way with it


@pytest.mark.parametrize("what", ["replica_killed", "engine_died"])
def test_every_request_is_answered_though_replicas_die(seen: Json, what: str) -> None:
    assert seen[what] == [[200, answer_to(f"q{i}")] for i in range(16)]


def test_a_stream_is_whole_or_says_that_it_is_not(seen: Json) -> None:
    whole = seen["whole_stream"][1]
    assert whole.count("data: ") == 4
    lost = 0
    for i, (status, text) in enumerate(seen["streams"]):
        assert status == 200
        if text != whole.replace("q0", f"q{i}"):
            assert text.endswith(LOST + "data: [DONE]\n\n")
            lost += 1
    assert lost > 0


def test_rays_own_ingress_loses_some_of_the_same(seen: Json) -> None:
    """So the tests above can fail."""
    assert sum(status != 200 for status, _ in seen["with_rays_ingress"]) > 0


def test_nothing_is_left_of_replicas_that_died(seen: Json) -> None:
    assert seen["orphans"] == []


def test_replicas_of_a_host_do_not_share_cores_while_there_are_enough(seen: Json) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) > 1:
        assert len(set(seen["cores"])) == 2
    assert all(set(map(int, cores.split(","))) <= set(allowed) for cores in seen["cores"])
