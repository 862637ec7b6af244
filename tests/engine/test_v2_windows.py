"""Sliding windows, logits processors of users and logprobs of named tokens on vLLM's V2 runner, in Triton's interpreter."""

from __future__ import annotations

import random

import pytest
from engines import Json, assert_same, run_script
from length import length

from clover_vllm.check.features import KINDS
from clover_vllm.check.tiny import make_tiny_pair

WINDOW = 20
NODES = 7


def requests_of(params: list[Json]) -> list[Json]:
    """One of each, with prompts up to over twice the window, that share their beginnings."""
    rng = random.Random(1)
    shared = [rng.randrange(3, 256) for _ in range(33)]
    made = []
    for i, own in enumerate(params):
        prompt = shared[: rng.choice([0, 16, 33])] + [
            rng.randrange(3, 256) for _ in range(rng.randrange(2, 14))
        ]
        given = {"max_tokens": length(8, 40), "ignore_eos": True, **own}
        made.append({"prompt": prompt, "params": given, "step": i // 2})
    return made


def windowed() -> list[Json]:
    return requests_of([kind for kind in KINDS.values() for _ in range(length(3, 8))])


def processed() -> list[Json]:
    """Changed by the processor or not, with named tokens or without, beside each other."""
    favour = {"extra_args": {"favour": True}}
    return requests_of(
        [
            {**kind, **own}
            for own in (
                favour,
                {"logprob_token_ids": [5, 9, 77]},
                {"logprobs": 2},
                {**favour, "logprob_token_ids": [40], "presence_penalty": 0.5},
                {},
            )
            for kind in KINDS.values()
        ]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Json:
    target, head = make_tiny_pair(tmp_path_factory.mktemp("windows"), kv_heads=1, window=WINDOW)
    spec = {
        "llm": {
            "model": str(target),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 128,
            "max_num_seqs": 6,
            "max_num_batched_tokens": 64,
            "block_size": 32,
            "num_gpu_blocks_override": 14,
            "logits_processors": ["processors_v2:FollowsOutput"],
        },
        "speculative": {
            "method": "clover2",
            "model": str(head),
            "num_speculative_tokens": NODES,
            "tree": "best_first",
        },
        "jobs": {
            "windows": {"requests": windowed(), "scripted": 0.8},
            "processors": {"requests": processed(), "scripted": 0.8},
        },
    }
    found: Json = run_script("run_v2", spec, 3000, {"TRITON_INTERPRET": "1"})
    return {**found, "jobs": spec["jobs"]}


def test_windows_give_what_plain_v2_gives(runs: Json) -> None:
    plain, trees = runs["plain"]["windows"], runs["clover"]["windows"]
    assert runs["cache"] == [["SlidingWindowSpec", WINDOW]]
    assert_same(plain, trees, range(len(plain["outputs"])))
    longest = max(
        len(request["prompt"]) + len(outputs[0]["tokens"])
        for request, outputs in zip(runs["jobs"]["windows"]["requests"], plain["outputs"], strict=True)
    )
    assert longest > 2 * WINDOW + 10
    assert trees["stats"]["accepted_in_branching"] > 5
    assert trees["stats"]["moved"] > 3
    assert trees["stats"]["leaked_blocks"] == 0


def test_logits_processors_and_logprobs_of_named_tokens(runs: Json) -> None:
    """The processor reads two tokens before a row, so that it is wrong in a tree that branches."""
    plain, trees = runs["plain"]["processors"], runs["clover"]["processors"]
    requests = runs["jobs"]["processors"]["requests"]
    assert_same(plain, trees, range(len(requests)))
    assert trees["stats"]["accepted"] > len(requests)
    assert trees["stats"]["accepted_in_branching"] > 3
    for request, outputs in zip(requests, trees["outputs"], strict=True):
        for named in request["params"].get("logprob_token_ids", []):
            assert all(named in [token for token, _, _ in position] for position in outputs[0]["logprobs"])
