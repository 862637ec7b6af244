"""The engine with trees says what plain vLLM says, token for token, on the real target."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Json, differing, run_engine, tokens_of
from length import length

from clover_vllm.base.paths import shipped_head
from clover_vllm.engine.options import CloverOptions
from clover_vllm.eval.evaluate import Answer, Evaluator, best_first
from clover_vllm.heads.clover2.checkpoint import load_head
from clover_vllm.target.frozen import FrozenTarget

pytestmark = pytest.mark.timeout(3600)

HELD_OUT = shipped_head() / "held-out.jsonl.gz"
COUNT = length(8, 200)
TOKENS = length(72, 128)
SPARE = length(4, 10)
TIE = 5e-5
"""Top two logits closer than this are a tie in float32: plain vLLM's own logits move by up to 4e-5
with the size of the batch (measured against float64), so it may take either token."""


def prompts(count: int) -> list[list[int]]:
    """Held-out prompts of the shipped head."""
    with gzip.open(HELD_OUT, "rt") as file:
        return [json.loads(line)["prompt_ids"] for _, line in zip(range(count), file, strict=False)]


def greedy(count: int) -> list[Json]:
    return [{"prompt": p, "params": {"temperature": 0.0, "max_tokens": TOKENS}} for p in prompts(count)]


def seeded(count: int) -> list[Json]:
    return [
        {
            "prompt": p,
            "params": {"temperature": 0.8, "top_p": 0.9, "seed": i, "max_tokens": TOKENS},
        }
        for i, p in enumerate(prompts(count))
    ]


def speculative(**options: Any) -> Json:
    fixed = {"tree": "best_first", "num_speculative_tokens": 8}
    return {"method": "clover2", "model": str(shipped_head()), **fixed, **options}


def engine(target: Path, **more: Any) -> Json:
    return {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        **more,
    }


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Json:
    """Plain vLLM: prompts whole, or seeded requests would end it (see `CloverRunner`)."""
    requests = greedy(COUNT + SPARE)
    for request in requests:
        request["params"]["logprobs"] = 2
    llm = engine(smollm2, max_num_batched_tokens=4096)
    return run_engine(llm, [*requests, *seeded(COUNT)], timeout=3000)


@pytest.fixture(scope="module")
def trees(smollm2: Path) -> Json:
    """Trees, with prompts in chunks and a cache too small for the batch; greedy and seeded requests of the
    same prompt run together, so that one finds the other's cache blocks."""
    llm = engine(
        smollm2,
        max_num_batched_tokens=160,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        block_size=32,  # prompts share less than vLLM's 128 here
        num_gpu_blocks_override=length(56, 72),
        speculative_config=speculative(),
    )
    requests = [*greedy(COUNT + SPARE), *seeded(COUNT)]
    seeds = COUNT + SPARE
    order = [i for a in range(0, COUNT, 2) for i in (a, a + 1, seeds + a, seeds + a + 1)]
    order += range(COUNT, seeds)
    run = run_engine(llm, [requests[i] for i in order], timeout=3000)
    by_request = dict(zip(order, run["outputs"], strict=True))
    return {**run, "outputs": [by_request[i] for i in range(len(requests))]}


def test_conditions_were_met(trees: Json) -> None:
    """Trees were verified and accepted, preemptions and prefix hits happened, and no cache block was lost."""
    stats = trees["stats"]
    print(stats)
    assert stats["worker"] == "CloverCPUWorker"
    assert stats["verified"]["branching"] > TOKENS // 4 * COUNT
    assert stats["accepted"] > stats["verified"]["branching"]
    assert not stats["fallbacks"]
    assert stats["preempted"] > 0
    assert stats["cached_tokens"] > 0
    assert stats["leaked_blocks"] == 0


def settled(sequence: Json, tokens: int = TOKENS) -> bool:
    """Whether none of the first tokens of a plain greedy answer was a tie in float32."""
    best = [sorted((p for _, p, _ in found), reverse=True)[:2] for found in sequence["logprobs"][:tokens]]
    return all(first - second > TIE for first, second in best)


def test_greedy_output_equals_plain_vllm(plain: Json, trees: Json) -> None:
    """`TOKENS` tokens for each prompt. Prompts on whose way plain vLLM meets a tie are set aside."""
    chosen = [i for i in range(COUNT + SPARE) if settled(plain["outputs"][i][0])][:COUNT]
    assert len(chosen) == COUNT
    a = {"outputs": [plain["outputs"][i] for i in chosen]}
    b = {"outputs": [trees["outputs"][i] for i in chosen]}
    assert sum(len(x) for (x,) in tokens_of(a)) > 0.7 * TOKENS * COUNT
    assert differing(a, b) == 0


def test_seeded_output_equals_plain_vllm(plain: Json, trees: Json) -> None:
    a = {"outputs": plain["outputs"][COUNT + SPARE :]}
    b = {"outputs": trees["outputs"][COUNT + SPARE :]}
    assert len(a["outputs"]) == COUNT
    assert differing(a, b) == 0


SHIPPED, SHIPPED_TOKENS = length(6, 60), length(48, 128)
OPTIONS: list[Json] = [{}, *({"tree": "best_first", "num_speculative_tokens": nodes} for nodes in (8, 16, 5))]
"""Beside the head: none, as in the README; in the full form also trees of one size, whatever time things take."""


@pytest.mark.parametrize("options", OPTIONS[: length(1, len(OPTIONS))], ids=str)
def test_compiled_engine_with_the_shipped_head_says_what_plain_vllm_says(
    smollm2: Path, plain: Json, options: Json
) -> None:
    """As users run it: of the engine, only its dtype and sizes are not the default.

    Plain vLLM runs eagerly here, as compiling takes longer than the answers; in float32 the two give the same tokens
    but for ties. Two thirds of the requests are greedy, a third have seeds. The first two run alone, so that nodes pay.
    """
    count = SHIPPED + 2
    places = [COUNT + SPARE + i if i % 3 == 2 else i for i in range(count)]
    asked = [seeded(count)[i] if i % 3 == 2 else greedy(count)[i] for i in range(count)]
    for i, request in enumerate(asked):
        request["params"]["max_tokens"] = SHIPPED_TOKENS
        request["step"] = min(i, 2) * SHIPPED_TOKENS
    llm: Json = {
        "model": str(smollm2),
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 2048,
        "speculative_config": {"model": str(shipped_head()), **options},
    }
    run = run_engine(llm, asked, timeout=3000)
    stats = run["stats"]
    print(stats)
    said = [plain["outputs"][place][0] for place in places]
    chosen = [i for i in range(count) if i % 3 == 2 or settled(said[i], SHIPPED_TOKENS)][:SHIPPED]
    assert len(chosen) == SHIPPED
    for i in chosen:
        assert run["outputs"][i][0]["tokens"] == said[i]["tokens"][:SHIPPED_TOKENS], i
    assert stats["compiled"]
    assert stats["worker"] == "CloverCPUWorker"
    assert stats["fallbacks"] == {}
    assert stats["leaked_blocks"] == 0
    assert stats["retrieves"] == (not options)
    if options:
        assert stats["verified"]["branching"] > 10 * SHIPPED
        assert stats["verified"]["branching"] > 5 * stats["verified"]["chains"]
        assert stats["accepted_in"]["branching"] > 5 * SHIPPED
        assert stats["off_first_chain"] > SHIPPED
    else:  # how many they are and how large depends on how busy the machine is
        assert stats["verified"]["branching"] > SHIPPED
        assert stats["accepted_in"]["branching"] > SHIPPED // 2
        assert stats["off_first_chain"] > 0
    lengths = [len(answer["tokens"][:SHIPPED_TOKENS]) for answer in said]
    assert stats["steps"] < (0.8 if options else 0.95) * (
        sum(lengths[:2]) + sum(lengths[2:]) / llm["max_num_seqs"]
    )


def gap(frozen: FrozenTarget, prompt: list[int], answer: list[int], other: list[int]) -> float | None:
    """Logit gap, in float32, between two answers' tokens where they first differ."""
    at = next((i for i, (x, y) in enumerate(zip(answer, other, strict=False)) if x != y), None)
    if at is None:
        return None
    hidden = frozen.hidden_states(torch.tensor([[*prompt, *answer[:at]]]))
    logits = frozen.norm(hidden)[0, -1] @ frozen.lm_head.T
    return float((logits[answer[at]] - logits[other[at]]).abs())


@pytest.mark.parametrize(
    ("dtype", "count"),
    [("bfloat16", length(6, 64)), ("float16", 24)][: length(1, 2)],
    ids=["bfloat16", "float16"][: length(1, 2)],
)
def test_half_precision_differs_at_near_ties_only(
    smollm2: Path, dtype: str, count: int, record_property: Callable[[str, object], None]
) -> None:
    """In half precision plain vLLM itself depends on the batch; the logit gaps say by how little."""
    requests = greedy(count)
    for request in requests:
        request["params"]["max_tokens"] = length(40, 64)
    llm = engine(smollm2, dtype=dtype, max_num_batched_tokens=1024)
    plain = run_engine(llm, requests)
    trees = run_engine({**llm, "speculative_config": speculative()}, requests)
    frozen = FrozenTarget(smollm2, torch.float32)
    found = [
        gap(frozen, request["prompt"], a, b)
        for request, (a,), (b,) in zip(requests, tokens_of(plain), tokens_of(trees), strict=True)
    ]
    differences = sorted(x for x in found if x is not None)
    record_property("first differences", differences)
    print(
        f"{dtype}: {len(differences)} of {count} answers differ, largest gap {max(differences, default=0):.3f}"
    )
    assert max(differences, default=0.0) < 0.5


def test_tokens_per_step_equal_those_of_the_evaluator(smollm2: Path) -> None:
    """The engine loses none of the head's quality: same target, same answers, same tree, float32."""
    options = CloverOptions()
    requests = greedy(length(5, 16))
    # The head reads the end of a prompt here, and all of it in the evaluator: longer answers even that out.
    for request in requests:
        request["params"]["max_tokens"] = 128
    llm = engine(smollm2, max_num_seqs=1, max_num_batched_tokens=1024, speculative_config=speculative())
    run = run_engine(llm, requests)
    answers = [tokens for (tokens,) in tokens_of(run)]
    # A request's first step is its prompt, which emits one token.
    steps = run["stats"]["steps"] - len(requests)
    in_engine = (sum(map(len, answers)) - len(requests)) / steps

    target = FrozenTarget(smollm2, torch.float32)
    evaluator = Evaluator(target, load_head(shipped_head()))
    growth = best_first(8, options.rounds(8), options.width(8), options.cutoffs)
    replays = [
        evaluator.replay(Answer("", torch.tensor(r["prompt"]), torch.tensor(tokens)), [growth])[0]
        for r, tokens in zip(requests, answers, strict=True)
    ]
    evaluated = sum(r.tokens for r in replays) / sum(r.steps for r in replays)
    assert in_engine == pytest.approx(evaluated, rel=0.02)
