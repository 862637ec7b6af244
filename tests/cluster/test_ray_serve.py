"""Ray Serve while replicas and engines are killed, come, go and change.

Minutes on two cores: `conftest.py` takes it up in the full form alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from chats import TINY_FLAGS, chat_lines
from engines import Json, run_script
from pairs import make_pair
from small import add_tokenizer
from stand_ins import answer_to
from test_ray import SUPPORT, on_ray

from clover_vllm.cluster.ingress import LOST


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """Two replicas with stand-ins for engines: one is killed, then another one's engine dies."""
    return on_ray(tmp_path_factory.mktemp("ray"), "kill")


@pytest.mark.parametrize("how", ["killed", "died"])
def test_every_request_is_answered_though_replicas_die(seen: Json, how: str) -> None:
    assert seen[how]["answers"] == [[200, answer_to(f"q{i}")] for i in range(8)]


@pytest.mark.parametrize("how", ["killed", "died"])
def test_a_stream_is_whole_or_says_that_it_is_not(seen: Json, how: str) -> None:
    whole, lost = seen["whole_stream"], 0
    assert whole.count("data: ") == 4
    for i, (status, text) in enumerate(seen[how]["streams"], start=8):
        assert status == 200
        if text != whole.replace("q0", f"q{i}"):
            assert text.endswith(LOST + "data: [DONE]\n\n")
            lost += 1
    assert lost > 0


@pytest.mark.parametrize("how", ["killed", "died"])
def test_rays_own_ingress_loses_requests_at_the_same_time(seen: Json, how: str) -> None:
    """So the tests above can fail."""
    assert not all(seen[how]["rays"])


def test_nothing_is_left_of_replicas_that_died(seen: Json) -> None:
    assert seen["victims"] == 2
    assert seen["orphans"] == []


def test_replicas_of_a_host_do_not_share_cores_while_there_are_enough(seen: Json) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) > 1:
        assert len(set(seen["cores"])) == 2
    assert all(set(map(int, cores.split(","))) <= set(allowed) for cores in seen["cores"])


@pytest.mark.parametrize("how", ["scale", "roll"])
def test_no_request_is_lost_while_replicas_come_and_go(tmp_path: Path, how: str) -> None:
    """A second replica comes and leaves by load; all are replaced by such with another head. Streams are whole."""
    seen = on_ray(tmp_path, how)
    if how == "scale":
        assert seen["replicas"] == [1, 2, 1]
    else:
        assert seen["heads"] == ["old", "old", "new", "new"]
    assert len(seen["answers"]) > 20
    for number, status, text in seen["answers"]:
        streamed = seen["whole_stream"].replace("q0", f"q{number}")
        assert (status, text) == (200, streamed if number % 2 else answer_to(f"q{number}"))
    assert seen["orphans"] == []


@pytest.mark.timeout(2400)
def test_chaos_loses_no_request_and_leaves_no_orphan(tmp_path: Path) -> None:
    """Each request is answered once and with plain vLLM's text, and metrics of two replicas are vLLM's own sums."""
    target, head = make_pair(tmp_path, "llama tied")
    add_tokenizer(target)
    requests = chat_lines(40, plain=True)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests))
    flags = ["--model", str(target), *TINY_FLAGS]
    spec = {"input": str(tmp_path / "in.jsonl"), "output": str(tmp_path / "plain.jsonl"), "flags": flags}
    run_script("run_batch", {**spec, "reference": True})
    plain = [
        [200, json.loads(line)["response"]["body"]["choices"][0]["message"]["content"]]
        for line in (tmp_path / "plain.jsonl").read_text().splitlines()
    ]
    paths = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    asked = {"target": str(target), "head": str(head), "requests": requests, "kills": 3, "seed": 0}
    seen: Json = run_script("run_ray_engines", asked, timeout=1500, env={"PYTHONPATH": paths})
    assert seen["quiet"] == plain[:12]
    assert len(seen["noisy"]) >= 200
    assert all(found == plain[i % 40] for i, found in enumerate(seen["noisy"]))
    assert len(set(seen["killed"])) == 3
    assert seen["orphans"] == []
    metrics = seen["metrics"]
    for ours, vllms in (
        ("tree_nodes_count_total", "num_drafts_total"),
        ("tree_nodes_sum_total", "num_draft_tokens_total"),
        ("accepted_depth_total", "num_accepted_tokens_total"),
    ):
        assert metrics[f"ray_clover_{ours}"] == metrics[f"ray_vllm_spec_decode_{vllms}"] > 0
