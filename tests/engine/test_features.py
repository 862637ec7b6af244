"""Every request feature of vLLM, with trees, gives what plain vLLM gives for the same request.

The trees are scripted: they hide plain vLLM's answer among random siblings, so that paths are accepted
whatever the parameters; one run has the head's own. All features share a batch, with prompts in chunks. Now and
then nothing is drafted, and vLLM's own sampler samples the step. What `docs/compatibility.md` says is drafted for a
feature, trees or chains, was verified for each of its requests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import documented
from engines import Json, assert_only_drafts_are_scored, assert_same, run_engine, tokens_of
from pairs import speculative
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from clover_vllm.check.features import FEATURES, KINDS, in_both_kinds
from clover_vllm.check.tiny import VOCAB, make_tiny_pair

CASES = in_both_kinds(FEATURES)
COPIES = 2
LASTING, LONG = 4, 24
"""Tokens of a request that has met a scripted draft, and a branching one: some steps have none or, by chance, a chain."""


def llm(target: Path, **more: Any) -> Json:
    return {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "block_size": 32,
        "num_gpu_blocks_override": 1024,  # ample; a whole GiB takes seconds to clear
        "max_num_batched_tokens": 4096,
        **more,
    }


def with_trees(head: Path) -> Json:
    """Prompts come in chunks here; plain vLLM cannot do that with seeds."""
    return {
        "max_num_batched_tokens": 64,
        "speculative_config": speculative(head),
    }


def requests_of(features: list[Json], seed: int = 1) -> list[Json]:
    """Requests of each feature in turn, with prompts of their own, arriving over time."""
    rng = random.Random(seed)
    return [
        {
            "prompt": [rng.randrange(3, 256) for _ in range(rng.randrange(3, 70))],
            "step": rng.randrange(60),
            "params": {"temperature": 0.0, "max_tokens": 32, "ignore_eos": True, **feature},
        }
        for _ in range(COPIES)
        for feature in features
    ]


def both(settings: Json, head: Path, requests: list[Json], **more: Any) -> tuple[Json, Json]:
    """Outputs of plain vLLM and of trees that hide plain vLLM's answers."""
    plain = run_engine(settings, requests)
    trees = run_engine(
        {**settings, **with_trees(head), **more},
        requests,
        scripted={"answers": tokens_of(plain), "seed": 5, "rest": 0.2},
    )
    assert_only_drafts_are_scored(trees["stats"])
    assert trees["stats"]["trees"]["branching"] > len(requests)
    assert trees["stats"]["verified"]["branching"] > len(requests)
    assert trees["stats"]["accepted"] > len(requests)
    assert "unknown_draft" not in trees["stats"]["fallbacks"]
    assert trees["stats"]["steps"] < plain["stats"]["steps"]
    assert trees["stats"]["leaked_blocks"] == 0
    return plain, trees


def assert_drafted(
    run: Json, chosen: Iterable[int], draft: str, lasting: int = LASTING, long: int = LONG
) -> int:
    """Drafts of that kind, and no branching trees but for "tree", were verified for each request that lasts.

    The drafter made some for it too: scripted ones would stand in for those of a drafter that makes none.

    Args:
        run: with trees.
        chosen: indices of requests.
        draft: "tree" or "chain".
        lasting, long: tokens of a request beyond which some draft was verified for it, and one that branches.

    Returns:
        how many last.
    """
    count = 0
    for i in chosen:
        said = max(len(one["tokens"]) for one in run["outputs"][i])
        chains, branching = run["stats"]["verified_by_request"].get(str(i), [0, 0])
        assert chains + branching > 0 or said <= lasting, f"nothing was drafted for request {i}"
        assert run["stats"]["own_drafts"].get(str(i), 0) > 0 or said <= lasting, (
            f"the head left out request {i}"
        )
        assert branching == 0 or draft == "tree", f"trees were drafted for request {i}"
        assert branching > 0 or draft == "chain" or said <= long, f"only chains were drafted for request {i}"
        count += said > lasting
    return count


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny_pair(tmp_path_factory.mktemp("spoken"))


def think(target: Path, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(target).encode(text, add_special_tokens=False)
    return ids


def featured(target: Path) -> tuple[Json, list[Json]]:
    """Settings of an engine and its requests, of all cases."""
    settings = llm(
        target, reasoning_config={"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
    )
    requests = requests_of([{**KINDS[kind], **FEATURES[feature]} for feature, kind in CASES])
    for request in requests:
        if "thinking_token_budget" in request["params"]:
            request["prompt"] += think(target, "<think>")
    return settings, requests


@pytest.fixture(scope="module")
def runs(pair: tuple[Path, Path]) -> tuple[Json, Json]:
    target, head = pair
    settings, requests = featured(target)
    return both(settings, head, requests)


@pytest.fixture(scope="module")
def own(pair: tuple[Path, Path]) -> Json:
    """The drafts that are verified are the head's own."""
    target, head = pair
    settings, requests = featured(target)
    return run_engine({**settings, **with_trees(head)}, requests)


def of_case(feature: str, kind: str) -> range:
    """Indices of a case's requests."""
    return range(CASES.index((feature, kind)), COPIES * len(CASES), len(CASES))


@pytest.mark.parametrize(("feature", "kind"), CASES)
def test_feature(runs: tuple[Json, Json], own: Json, feature: str, kind: str) -> None:
    plain, trees = runs
    chosen = of_case(feature, kind)
    assert_same(plain, trees, chosen)
    assert_same(plain, own, chosen)
    assert all(plain["outputs"][i][0]["tokens"] for i in chosen)


@pytest.mark.parametrize(("feature", "kind"), CASES)
def test_every_request_is_drafted_for_as_the_docs_say(
    runs: tuple[Json, Json], own: Json, feature: str, kind: str
) -> None:
    """The head's own trees reach every request from its second token on; a grammar may drop its chains."""
    drafts = {documented()[name] for name in {**KINDS[kind], **FEATURES[feature]}}
    draft = "chain" if "chain" in drafts else "tree"
    lasting = assert_drafted(runs[1], of_case(feature, kind), draft)
    if draft == "tree":
        lasting = assert_drafted(own, of_case(feature, kind), draft, lasting=1, long=1)
    assert lasting


STOPPING = ["stop", "include_stop_str_in_output", "min_tokens"]


@pytest.fixture(scope="module")
def stopping(pair: tuple[Path, Path]) -> tuple[Json, Json]:
    """Two dozen requests of each feature that stops, in turn."""
    target, head = pair
    features = [{**kind, **FEATURES[feature]} for feature in STOPPING for kind in KINDS.values()]
    return both(llm(target), head, requests_of(features * 6, seed=3))


@pytest.mark.parametrize("feature", STOPPING)
def test_stops_lie_inside_accepted_paths(stopping: tuple[Json, Json], feature: str) -> None:
    """The last step of some request emits several tokens, and a stop is the last of those that stay."""
    plain, trees = stopping
    count = len(KINDS)
    chosen = [
        i for i in range(len(trees["outputs"])) if i // count % len(STOPPING) == STOPPING.index(feature)
    ]
    assert_same(plain, trees, chosen)
    before, emitted = trees["stats"]["tokens_before_last_draft"], trees["stats"]["emitted_by_last_draft"]
    last = [
        (len(trees["outputs"][i][0]["tokens"]) - before[str(i)], emitted[str(i)])
        for i in chosen
        if trees["outputs"][i][0]["finish"] == "stop" and str(i) in before
    ]
    last = [
        (kept, given) for kept, given in last if kept <= given
    ]  # the others ended in a step without drafts
    print(feature, last)
    assert len(last) > 3
    assert max(kept for kept, _ in last) > 1
    if feature == "min_tokens":  # stops at a token: the path ends with it
        assert all(kept == given for kept, given in last)
    else:  # stops at a text, which only the front end sees: accepted tokens behind it are dropped
        assert any(1 < kept < given for kept, given in last)


@pytest.mark.parametrize("kind", KINDS)
def test_features_did_something(runs: tuple[Json, Json], pair: tuple[Path, Path], kind: str) -> None:
    """The thinking ends at its budget, choices are among the given ones, chains are counted."""
    trees = runs[1]
    end = think(pair[0], "</think>")
    for i in of_case("thinking_token_budget", kind):
        tokens = trees["outputs"][i][0]["tokens"]
        # vLLM 0.32.0 ends the thinking at its budget of 6 or a few tokens later; `test_feature` compares.
        assert any(tokens[at : at + len(end)] == end for at in range(6, 11))
    for i in of_case("structured choice", kind):
        # With a reasoning configuration vLLM leaves the thinking before a choice alone.
        assert trees["outputs"][i][0]["text"].endswith(("positive", "negative", "neither of them"))
    for feature in ("stop", "include_stop_str_in_output", "stop_token_ids", "eos"):
        both_kinds = [i for either in KINDS for i in of_case(feature, either)]
        assert any(trees["outputs"][i][0]["finish"] == "stop" for i in both_kinds), feature
    found = [trees["outputs"][i][0]["finish"] for i in of_case("repetition_detection", kind)]
    assert "repetition" in found
    letters = {token for letter in "aeiors" for token in think(pair[0], letter)}
    for i in of_case("bad_words", kind):
        assert not letters.intersection(trees["outputs"][i][0]["tokens"])
    for i in of_case("allowed_token_ids", kind):
        assert all(40 <= token < 120 for token in trees["outputs"][i][0]["tokens"])
    for i in of_case("logit_bias", kind):
        assert {20, 99}.intersection(trees["outputs"][i][0]["tokens"])
    for i in of_case("min_tokens", kind):
        assert len(trees["outputs"][i][0]["tokens"]) >= 12
    assert trees["stats"]["fallbacks"]["structured_output"] > 0


def test_custom_logits_processors_and_processed_logprobs(pair: tuple[Path, Path]) -> None:
    """Processors of a user's own beside vLLM's; also priorities."""
    target, head = pair
    seeded = KINDS["seeded"]
    settings = llm(
        target,
        logits_processors=["processors:PerRequest", "processors:FollowsOutput"],
        logprobs_mode="processed_logprobs",
        scheduling_policy="priority",
    )
    requests = requests_of(
        [
            {},
            {"extra_args": {"every_other": True}},
            {**seeded, "extra_args": {"every_other": True}, "logprobs": 2},
            {"extra_args": {"favour": True}, "min_p": 0.1},
            {**seeded, "extra_args": {"favour": True, "every_other": True}, "presence_penalty": 0.5},
            {**seeded, "logprobs": 3, "top_k": 7},
        ]
    )
    for i, request in enumerate(requests):
        request["priority"] = i % 3
    plain, trees = both(settings, head, requests)
    assert_same(plain, trees, range(len(requests)))
    assert_drafted(
        trees, range(len(requests)), documented()["test_custom_logits_processors_and_processed_logprobs"]
    )
    for i in range(1, len(requests), 6):
        assert [t % 2 for t in plain["outputs"][i][0]["tokens"]] == [1, 0] * 16


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits"])
def test_logits_beside_the_tokens(pair: tuple[Path, Path], mode: str) -> None:
    """The modes of `--logprobs-mode` that other tests do not use, and the logits of the whole vocabulary."""
    asked = [
        {**kind, "logprobs": 2, **more} for kind in KINDS.values() for more in ({}, {"presence_penalty": 0.5})
    ]
    requests = requests_of([*asked, {"logprobs": -1}])
    plain, trees = both(llm(pair[0], logprobs_mode=mode, max_logprobs=-1), pair[1], requests)
    whole = [i for i, request in enumerate(requests) if request["params"]["logprobs"] == -1]
    assert_same(plain, trees, [i for i in range(len(requests)) if i not in whole])
    for i in whole:  # among all of the vocabulary some are so near each other that they swap places
        (one,), (other,) = plain["outputs"][i], trees["outputs"][i]
        assert one["tokens"] == other["tokens"]
        for position, again in zip(one["logprobs"], other["logprobs"], strict=True):
            assert position[0][0] == again[0][0]
            assert len(position) >= VOCAB
            assert {t: p for t, p, _ in again} == pytest.approx({t: p for t, p, _ in position}, abs=1e-4)


def make_adapter(folder: Path, target: Path, seed: int) -> Path:
    """A random LoRA adapter of rank 4."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    model = LlamaForCausalLM.from_pretrained(target)
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    for name, layer in model.named_modules():
        if name.rpartition(".")[2] in modules:
            rows, columns = layer.weight.shape
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_lora_adapters_on_the_target(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Two adapters in one batch. No request goes without: in a batch with adapters, plain vLLM 0.32.0 on a
    CPU gives such a request the last adapter (index -1), alone it does not."""
    target, head = pair
    adapters = [make_adapter(tmp_path / "one", target, 1), make_adapter(tmp_path / "number two", target, 2)]
    requests = requests_of([{}, {}, KINDS["seeded"], KINDS["seeded"]])
    for i, request in enumerate(requests):
        request["lora"] = str(adapters[i % 2])
    settings = llm(target, enable_lora=True, max_loras=2, max_lora_rank=8)
    plain, trees = both(settings, head, requests, max_num_batched_tokens=128)
    assert_same(plain, trees, range(len(requests)))
    assert_drafted(trees, range(len(requests)), documented()["test_lora_adapters_on_the_target"])
    swapped = [{**r, "lora": str(adapters[1 - i % 2])} for i, r in enumerate(requests)]
    other = run_engine(settings, swapped)
    for one, two in zip(plain["outputs"], other["outputs"], strict=True):
        assert one[0]["tokens"] != two[0]["tokens"]


def test_prompts_as_embeddings_and_logprobs_of_chosen_tokens(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The latter in no batch with other logprobs, whose candidates plain vLLM 0.32.0 loses then."""
    target, head = pair
    model = LlamaForCausalLM.from_pretrained(target)
    requests = requests_of(
        [{}, KINDS["seeded"], *({**kind, "logprob_token_ids": [5, 9, 77]} for kind in KINDS.values()), {}]
    )
    for i, request in enumerate(requests):
        if "logprob_token_ids" not in request["params"]:
            path = tmp_path / f"{i}.pt"
            ids = torch.tensor(request["prompt"])
            torch.save(model.get_input_embeddings()(ids).detach(), path)
            request["embeds"] = str(path)
    settings = llm(target, enable_prompt_embeds=True)
    plain, trees = both(settings, head, requests)
    assert_same(plain, trees, range(len(requests)))
    draft = documented()["test_prompts_as_embeddings_and_logprobs_of_chosen_tokens"]
    assert_drafted(trees, range(len(requests)), draft)
