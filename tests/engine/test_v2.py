"""Trees on vLLM's V2 model runner, the one for GPUs, give what plain V2 gives: in Triton's interpreter, on a CPU.

The sizes of trees change at random from step to step. CUDA graphs are stood in for by records of what is launched.

All runs share one plain engine and one with trees, whose cache is so small that requests are preempted, and whose
steps are so small that prompts come in chunks.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engines import Json, assert_same, run_script
from length import FULL, length

from clover_vllm.check.features import FEATURES, KINDS, in_both_kinds, in_one_kind
from clover_vllm.check.tiny import make_tiny_pair
from clover_vllm.check.torture import difference, random_wave, shortened

NODES = 7
LONGEST = length(6, 32)


def feature_requests() -> list[Json]:
    """Each feature, with prompts that share their beginnings; some are aborted."""
    rng = random.Random(2)
    shared = [rng.randrange(3, 256) for _ in range(65)]
    requests: list[Json] = []
    cases = in_both_kinds(FEATURES) if FULL else in_one_kind(FEATURES)
    for i, (feature, kind) in enumerate(cases + [("none", "greedy"), ("none", "seeded")] * 3):
        prompt = [
            *shared[: rng.choice([0, 20, 33, 65])],
            *(rng.randrange(3, 256) for _ in range(rng.randrange(2, length(9, 20)))),
        ]
        params = {"max_tokens": LONGEST, "ignore_eos": True, **KINDS[kind], **FEATURES[feature]}
        params["min_tokens"] = min(params.get("min_tokens", 0), LONGEST // 2)
        params["stop_token_ids"] = params.get("stop_token_ids", [])[
            :100
        ]  # V2 takes up to 128 with min_tokens
        requests.append({"prompt": prompt, "params": params, "step": i // 3})
    for request in requests[5::12]:
        request["abort"] = request["step"] + 4
    return requests


def torture_requests() -> list[Json]:
    """Random requests of the torture test, shorter in `make test`."""
    rng = random.Random(4)
    wave = shortened(random_wave(rng, length(10, 300), 120, []), length(6, 20))
    for request in wave:
        request["prompt"] = request["prompt"][:100]
    return wave


def short_requests() -> list[Json]:
    return [
        {"prompt": [3 + i, 20, 44], "params": {"max_tokens": 4, "ignore_eos": True, **kind}}
        for i, kind in enumerate(KINDS.values())
    ]


def watched_requests() -> list[Json]:
    """Prompts in chunks, penalties, logprobs, grammars; more than the cache holds."""
    rng = random.Random(6)
    features = ["none", "frequency_penalty", "logprobs", "structured regex", "bad_words", "prompt_logprobs"]
    return [
        {
            "prompt": [rng.randrange(3, 256) for _ in range(rng.choice([30, length(50, 70)]))],
            "params": {"max_tokens": length(8, 24), "ignore_eos": True, **kind, **FEATURES[feature]},
            "step": i,
        }
        for i, (feature, kind) in enumerate((f, kind) for f in features for kind in KINDS.values())
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Json:
    target, head = make_tiny_pair(tmp_path_factory.mktemp("v2"), kv_heads=1)
    jobs = {
        "features": {"requests": feature_requests(), "scripted": 0.8},
        "head": {"requests": short_requests(), "count_reads": True},
        "chosen": {"requests": short_requests(), "chooses": True},
        "script": {"requests": short_requests(), "count_reads": True, "scripted": 1.0},
        "watched": {"requests": watched_requests(), "count_reads": True, "scripted": 0.7},
        "planted": {
            "requests": [r for r in watched_requests() if "structured_outputs" in r["params"]],
            "count_reads": True,
            "planted": True,
        },
        "torture": {"requests": torture_requests(), "scripted": 1.0, "graphs": [1, 3, 8, 24, 40]},
    }
    found: Json = run_script("run_v2", specification(target, head, jobs), 3000, {"TRITON_INTERPRET": "1"})
    return {**found, "jobs": jobs}


def specification(target: Path, head: Path, jobs: Json) -> Json:
    llm = {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
        "block_size": 32,
        "num_gpu_blocks_override": length(8, 9),
        "reasoning_config": {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"},
    }
    speculative = {
        "method": "clover2",
        "model": str(head),
        "num_speculative_tokens": NODES,
        "tree": "adaptive",
        "draft_rounds": 3,
    }
    return {"llm": llm, "speculative": speculative, "jobs": jobs}


def not_aborted(job: Json) -> list[int]:
    return [i for i, request in enumerate(job["requests"]) if "abort" not in request]


def test_both_engines_are_v2_and_schedule_ahead(runs: Json) -> None:
    assert runs["plain runner"] == "vllm.v1.worker.cpu.model_runner"
    assert "CloverV2Runner" in runs["clover runner"]
    assert runs["scheduler"][:2] == ["SizedScheduler", "AsyncScheduler"]


def test_every_feature_gives_what_plain_v2_gives(runs: Json) -> None:
    plain, trees = runs["plain"]["features"], runs["clover"]["features"]
    assert_same(plain, trees, not_aborted(runs["jobs"]["features"]))


def test_branching_trees_were_accepted_beside_prompts_and_in_preempted_requests(runs: Json) -> None:
    stats = runs["clover"]["features"]["stats"]
    assert stats["accepted"] > 30
    assert stats["accepted_in_branching"] > 5
    assert stats["moved"] > 5
    assert stats["mixed_steps"] > 5
    assert stats["preempted"] > 0
    assert stats["cached_tokens"] > 0
    assert stats["leaked_blocks"] == 0


def test_random_requests_give_what_plain_v2_gives(runs: Json) -> None:
    plain, trees = runs["plain"]["torture"], runs["clover"]["torture"]
    found: dict[int, Any] = {}
    for i in not_aborted(runs["jobs"]["torture"]):
        wrong = difference(plain["outputs"][i], trees["outputs"][i])
        if wrong is not None:
            found[i] = wrong
    assert not found
    assert trees["stats"]["accepted"] > 5
    assert trees["stats"]["leaked_blocks"] == 0


def test_what_was_verified_and_accepted_is_counted(runs: Json) -> None:
    for name in runs["jobs"]:
        stats = runs["clover"][name]["stats"]
        assert stats["counted"] == pytest.approx(stats["tally"], rel=1e-6), name
    nodes, trees, promised, first, greedy, greedy_first = stats["counted"][:6]
    assert nodes > trees > greedy > greedy_first > 0
    assert first > greedy_first
    assert promised > 0
    sizes, drafted, accepted = (
        stats["counted"][start : start + NODES] for start in (7, 7 + NODES, 7 + 2 * NODES)
    )
    assert sum(sizes) == drafted[0] == trees
    assert all(drafted[i] >= accepted[i] for i in range(NODES))
    assert accepted[2] > 0


def test_random_requests_were_served_by_graphs_of_all_parts_padded_and_not(runs: Json) -> None:
    replays = runs["clover"]["torture"]["stats"]["replays"]
    for part, rows in (("target", "12358"), ("block", "12358"), ("growth", "2358")):
        assert sorted(replays[part]) == list(rows), part
        assert all(sum(of_size.values()) for of_size in replays[part].values()), (part, replays[part])
    assert sorted(replays["target"]["8"]) == ["1", "3", "5"]


def test_sizes_are_chosen_by_what_steps_took(runs: Json) -> None:
    plain, trees = runs["plain"]["chosen"], runs["clover"]["chosen"]
    assert_same(plain, trees, not_aborted(runs["jobs"]["chosen"]))
    assert runs["learnt"] == [0, 1, 2, 4, 7]


def test_the_head_drafts_and_nothing_is_read_on_the_host(runs: Json) -> None:
    stats = runs["clover"]["head"]["stats"]
    assert stats["drafts"] > 0
    assert stats["reads"] == {}
    assert runs["clover"]["script"]["stats"]["reads"], (
        "the scripted trees look at the device, so reads are seen"
    )


def test_requests_of_all_sorts_are_served_without_reading_on_the_host(runs: Json) -> None:
    """What vLLM reads, it reads without us too, but for two tensors of the host, which are bounds of lengths."""
    plain, trees = runs["plain"]["watched"], runs["clover"]["watched"]
    assert_same(plain, trees, range(len(plain["outputs"])))
    stats = trees["stats"]
    assert stats["accepted"] > 10
    assert stats["mixed_steps"] > 3
    assert stats["preempted"] > 0
    assert set(stats["reads"]) == {"scripted.py"}
    more = set(stats["vllm reads"]) - set(plain["stats"]["vllm reads"])
    assert {place.partition(":")[0] for place in more} == {
        "rejection_sampler.py _verify_in_chunks",
        "speculator.py _build_attn_metadata",
    }


def test_a_read_where_a_grammar_is_followed_is_seen(runs: Json) -> None:
    assert set(runs["clover"]["planted"]["stats"]["reads"]) == {"trees.py"}
