"""What users run: the shipped head on its real target, compiled, with the default options.

Plain vLLM runs eagerly here, as compiling takes longer than the answers; in float32 the two give the same
tokens but for ties, and prompts on whose way plain vLLM meets a tie are set aside.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from engines import Json, differing, run_engine
from length import length

from clover_vllm.base.paths import shipped_head

COUNT = length(10, 60)
SPARE = 2
TOKENS = length(48, 128)
OPTIONS: list[Json] = [{}, *({"tree": "best_first", "num_speculative_tokens": nodes} for nodes in (8, 16, 5))]
"""Beside the head: none, as in the README; in the full form also trees of one size, whatever time things take."""
TIE = 5e-5
"""Logits that close are a tie in float32 (see `test_engine_exact.py`)."""

pytestmark = pytest.mark.timeout(3600)


def requests() -> list[Json]:
    """Held-out prompts, two thirds of them greedy, a third with seeds. The first two run alone, so that nodes pay."""
    with gzip.open(shipped_head() / "held-out.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for _, line in zip(range(COUNT + SPARE), file, strict=False)]
    found = []
    for i, row in enumerate(rows):
        params: Json = {"temperature": 0.7, "top_p": 0.9, "seed": i} if i % 3 == 2 else {"temperature": 0.0}
        params |= {"max_tokens": TOKENS, "logprobs": 2 if i % 3 < 2 else None}
        found.append({"prompt": row["prompt_ids"], "step": min(i, 2) * TOKENS, "params": params})
    return found


def settings(target: Path) -> Json:
    return {
        "model": str(target),
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 2048,
    }


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Json:
    return run_engine({**settings(smollm2), "enforce_eager": True}, requests(), timeout=3000)


@pytest.mark.parametrize("options", OPTIONS[: length(1, len(OPTIONS))], ids=str)
def test_compiled_engine_with_the_shipped_head_says_what_plain_vllm_says(
    smollm2: Path, plain: Json, options: Json
) -> None:
    """Of the engine, only its dtype and sizes are not the default."""
    asked = requests()
    for request in asked:  # without them, as most users; rows then go through the scorer's one pass
        request["params"]["logprobs"] = None
    speculative = {"model": str(shipped_head()), **options}
    run = run_engine({**settings(smollm2), "speculative_config": speculative}, asked, timeout=3000)
    stats = run["stats"]
    print(stats)
    assert stats["compiled"]
    chosen = [i for i, outputs in enumerate(plain["outputs"]) if settled(outputs[0])][:COUNT]
    assert len(chosen) == COUNT
    a, b = ({"outputs": [found["outputs"][i] for i in chosen]} for found in (plain, run))
    assert differing(a, b) == 0
    assert stats["worker"] == "CloverCPUWorker"
    assert stats["fallbacks"] == {}
    assert stats["leaked_blocks"] == 0
    assert stats["retrieves"] == (not options)
    if options:
        assert stats["verified"]["branching"] > 10 * COUNT
        assert stats["verified"]["branching"] > 5 * stats["verified"]["chains"]
        assert stats["accepted_in"]["branching"] > 5 * COUNT
        assert stats["off_first_chain"] > COUNT
    else:  # how many they are and how large depends on how busy the machine is
        assert stats["verified"]["branching"] > 2 * COUNT
        assert stats["accepted_in"]["branching"] > COUNT
        assert stats["off_first_chain"] > COUNT // 2
    assert stats["steps"] < 0.8 * plain["stats"]["steps"]


def settled(sequence: Json) -> bool:
    """Whether no token of a plain greedy answer was a tie in float32; a seeded one counts as settled."""
    best = [sorted((p for _, p, _ in found), reverse=True)[:2] for found in sequence["logprobs"] or []]
    return all(first - second > TIE for first, second in best)
