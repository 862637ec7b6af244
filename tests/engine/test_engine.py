"""The engine with trees on small random targets: every path of the glue, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import Json, differing, run_engine, tokens_of
from pairs import FAMILIES, llm, make_pair, random_requests, speculative


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("llama"), "llama tied")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_random_trees_change_nothing(family: str, tmp_path: Path) -> None:
    """Right continuations in scattered rows, chunked prompts, preemptions, prefix hits: same tokens,
    and the same keys and values as a plain prefill computes."""
    target, head = make_pair(tmp_path, family)
    requests = random_requests(40)
    plain = run_engine(llm(target), requests)
    settings = llm(
        target, max_num_batched_tokens=48, num_gpu_blocks_override=20, speculative_config=speculative(head)
    )
    scripted = run_engine(
        settings,
        requests,
        scripted={"answers": tokens_of(plain), "seed": 3},
        check_cache=True,
    )
    stats = scripted["stats"]
    assert differing(plain, scripted) == 0
    assert stats["trees"]["branching"] > 100
    assert stats["verified"]["branching"] > 100
    assert stats["accepted"] > 100
    assert stats["steps"] < plain["stats"]["steps"]
    assert stats["preempted"] > 0
    assert stats["cached_tokens"] > 32
    assert stats["leaked_blocks"] == 0
    assert stats["cache_rows"] > 1000
    assert stats["cache_error"] < 1e-5


@pytest.fixture(scope="module")
def plain_dozen(llama: tuple[Path, Path]) -> Json:
    return run_engine(llm(llama[0]), random_requests(12))


@pytest.mark.parametrize("tree", ["best_first", "chain", "published", [[0], [1], [0, 0], [0, 0, 0]]])
def test_every_shape_drafts_and_changes_nothing(
    llama: tuple[Path, Path], plain_dozen: Json, tree: object
) -> None:
    target, head = llama
    run = run_engine(llm(target, speculative_config=speculative(head, tree=tree)), random_requests(12))
    assert differing(plain_dozen, run) == 0
    assert run["stats"]["leaked_blocks"] == 0
    assert run["stats"]["worker"] == "CloverCPUWorker"
    assert run["stats"]["verified"]["chains" if tree == "chain" else "branching"] > 10


def test_two_threads_change_nothing(llama: tuple[Path, Path], plain_dozen: Json) -> None:
    """Other tests compute with one, since each worker has one core."""
    target, head = llama
    run = run_engine(
        llm(target, speculative_config=speculative(head)),
        random_requests(12),
        scripted={"answers": tokens_of(plain_dozen), "seed": 6},
        threads=2,
    )
    assert run["stats"]["threads"] == 2
    assert differing(plain_dozen, run) == 0
    assert run["stats"]["verified"]["branching"] > 10
    assert run["stats"]["accepted"] > 10


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
def test_trees_are_verified_in_the_layout_that_vllm_takes_for_matrix_tiles(llama: tuple[Path, Path]) -> None:
    """Keys and values are those of a plain prefill, as nearly as bfloat16 has them."""
    target, head = llama
    plain = run_engine(llm(target, dtype="bfloat16"), random_requests(12))
    run = run_engine(
        llm(target, dtype="bfloat16", speculative_config=speculative(head)),
        random_requests(12),
        scripted={"answers": tokens_of(plain), "seed": 7},
        check_cache=True,
    )
    assert run["stats"]["layouts"] == ["amx"]
    assert run["stats"]["verified"]["branching"] > 10
    assert run["stats"]["accepted"] > 10
    assert run["stats"]["cache_error"] < 0.05


def test_max_model_len_inside_a_tree_and_aborts(llama: tuple[Path, Path]) -> None:
    target, head = llama
    requests = random_requests(24)
    for i, request in enumerate(requests):
        request["params"]["max_tokens"] = None
        if i % 4 == 3:
            request["abort"] = request["step"] + 5 + i
    plain = run_engine(llm(target, max_model_len=160), [r for r in requests if "abort" not in r])
    settings = llm(target, max_model_len=160, speculative_config=speculative(head))
    answers = iter(tokens_of(plain))
    known = [[] if "abort" in r else next(answers) for r in requests]
    run = run_engine(settings, requests, scripted={"answers": known, "seed": 4})
    kept = {"outputs": [o for r, o in zip(requests, run["outputs"], strict=True) if "abort" not in r]}
    assert differing(plain, kept) == 0
    assert all(
        len(r["prompt"]) + len(tokens) == 160
        for r, (tokens,) in zip((r for r in requests if "abort" not in r), tokens_of(kept), strict=True)
    )
    assert run["stats"]["leaked_blocks"] == 0


def test_request_features_beside_each_other(llama: tuple[Path, Path]) -> None:
    """Penalties, masks, minimum lengths, stop tokens, logprobs, seeds and n, all in one batch."""
    target, head = llama
    features: list[Json] = [
        {},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 0.8, "frequency_penalty": 0.6, "temperature": 0.7, "seed": 3},
        {"allowed_token_ids": list(range(3, 60))},
        {"min_tokens": 9, "stop_token_ids": list(range(3, 120)), "ignore_eos": False},
        {"stop_token_ids": list(range(3, 30))},
        {"logprobs": 3},
        {"logprobs": 0, "temperature": 1.0, "seed": 11},
        {"temperature": 0.9, "top_k": 5, "seed": 4},
        {"temperature": 1.1, "top_p": 0.7, "seed": 5, "n": 2},
        {"logprobs": 2, "repetition_penalty": 1.2, "temperature": 0.6, "seed": 6},
        {"prompt_logprobs": 1},
    ]
    requests = random_requests(36)
    for i, request in enumerate(requests):
        request["params"].update(features[i % len(features)])
        request["params"]["max_tokens"] = 24
    plain = run_engine(llm(target, max_num_batched_tokens=2048), requests)
    settings = llm(target, max_num_batched_tokens=64, speculative_config=speculative(head))
    run = run_engine(settings, requests, scripted={"answers": tokens_of(plain), "seed": 5})
    assert run["stats"]["trees"]["branching"] > 30
    assert differing(plain, run) == 0
    for a, b in zip(plain["outputs"], run["outputs"], strict=True):
        for one, other in zip(a, b, strict=True):
            assert one["finish"] == other["finish"]
            assert (one["logprobs"] is None) == (other["logprobs"] is None)
            for position, again in zip(one["logprobs"] or [], other["logprobs"] or [], strict=True):
                assert [(t, rank) for t, _, rank in position] == [(t, rank) for t, _, rank in again]
                assert [p for _, p, _ in position] == pytest.approx([p for _, p, _ in again], abs=1e-4)


def test_other_methods_run_as_if_clover_were_not_installed(llama: tuple[Path, Path]) -> None:
    """No method and ngram: vLLM's own worker, and the outputs of a vLLM without plugins."""
    target, _ = llama
    requests = random_requests(8)
    for more in ({}, {"speculative_config": _ngram()}):
        with_plugin = run_engine(llm(target, **more), requests)
        without = run_engine(llm(target, **more), requests, env={"VLLM_PLUGINS": ""})
        assert with_plugin["outputs"] == without["outputs"]
        assert with_plugin["stats"]["steps"] == without["stats"]["steps"]
        assert with_plugin["stats"]["worker"] == "CPUWorker"
        assert (with_plugin["stats"]["hooked"], without["stats"]["hooked"]) == (True, False)


def _ngram() -> Json:
    return {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
