"""Tensor- and data-parallel engines say what one rank without Clover-2 says, and count what they do once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from engines import Json, run_script, tokens_of
from length import length
from pairs import llm, make_pair, random_requests, speculative

ADAPTIVE = {"tree": "adaptive", "num_speculative_tokens": 16}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama tied")


@pytest.fixture(scope="module")
def requests() -> list[Json]:
    """Greedy ones and seeded ones in turn."""
    made = random_requests(length(6, 60))
    for i, request in enumerate(made):
        request["step"] //= length(8, 1)
        request["params"] |= {"max_tokens": length(16, 60)}
        request["params"] |= {"temperature": 0.8, "seed": i, "top_p": 0.9} if i % 2 else {}
    return made


@pytest.fixture(scope="module")
def plain(pair: tuple[Path, Path], requests: list[Json]) -> Json:
    """One rank, without Clover-2."""
    run: Json = run_script("run_parallel", {"llm": llm(pair[0]), "requests": requests})
    return run


def bound(engines: int) -> dict[str, str]:
    """All engines on this test's cores."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join([cores] * engines)}


def test_two_ranks_say_what_one_says_without_drafts(
    pair: tuple[Path, Path], requests: list[Json], plain: Json
) -> None:
    """Adaptive trees of random sizes that hide the answers now and then: the first rank decides, both verify."""
    target, head = pair
    spec = {
        "llm": llm(target, tensor_parallel_size=2, speculative_config=speculative(head, **ADAPTIVE)),
        "requests": requests,
        "scripted": {"answers": tokens_of(plain), "seed": 5, "share": 0.3},
        "restless": 3,
    }
    run = run_script("run_parallel", spec, env=bound(2))
    assert tokens_of(run) == tokens_of(plain)
    first, second = run["ranks"]
    assert first["trees"] == second["trees"]
    assert (first["decides"], second["decides"]) == (True, False)
    assert (first["exports"], second["exports"]) == (True, False)
    assert first["accepted"] == second["accepted"] > 5
    assert first["grown_by_the_head"] == second["grown_by_the_head"] > 0
    assert first["sizes"] > 1
    assert run["metrics"]["clover:tree_nodes_count"] == first["drafts"]
    assert run["metrics"]["clover:tree_nodes_sum"] == first["nodes"]
    assert run["metrics"]["clover:accepted_depth_total"] == first["accepted"]
    assert run["metrics"]["clover:observed_seconds_total"] > 0


def test_two_replicas_say_what_one_says_without_drafts(
    pair: tuple[Path, Path], requests: list[Json], plain: Json
) -> None:
    """Both count, and what they count adds up to vLLM's own sums."""
    target, head = pair
    engine = llm(target, data_parallel_size=2, speculative_config=speculative(head))
    run = run_script("run_replicas", {"engine": engine, "requests": requests}, env=bound(2))
    assert run["tokens"] == [sequences[0] for sequences in tokens_of(plain)]
    metrics = run["metrics"]
    for ours, vllms in (
        ("clover:tree_nodes_count", "vllm:spec_decode_num_drafts_total"),
        ("clover:tree_nodes_sum", "vllm:spec_decode_num_draft_tokens_total"),
        ("clover:accepted_depth_total", "vllm:spec_decode_num_accepted_tokens_total"),
    ):
        assert metrics[ours] == metrics[vllms]
        assert sorted(metrics[ours]) == ["0", "1"]
    assert min(metrics["clover:tree_nodes_count"].values()) > 0
