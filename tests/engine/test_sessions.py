"""Streaming sessions: what one turn leaves behind is what the next one goes on from."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from engines import run_script
from length import length

from clover_vllm.base.paths import shipped_head


def sessions() -> list[dict[str, Any]]:
    """Held-out prompts cut in four; turns end at a token, a length or a repetition, mostly inside a path."""
    with gzip.open(shipped_head() / "held-out.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for _, line in zip(range(length(3, 8)), file, strict=False)]
    found = []
    for i, row in enumerate(rows):
        prompt = row["prompt_ids"]
        later = [prompt[4:5], prompt[5:7], prompt[7 : 8 + i]]
        stops = sorted({token for token in range(1000, 49000) if token % 7 == i % 7}) if i % 2 else []
        params = {"temperature": 0.0, "max_tokens": 4 + i, "stop_token_ids": stops}
        found.append({"turns": [prompt, *later], "params": params})
        repetition = {"max_pattern_size": 1 + i, "min_count": 2}
        repeated = {"temperature": 0.0, "max_tokens": length(60, 80), "repetition_detection": repetition}
        found.append({"turns": [prompt, *later], "params": repeated})
        seeded = {"temperature": 0.6, "top_p": 0.9, "seed": i}
        found.append({"turns": [prompt, *later], "params": {**(params if i % 3 else repeated), **seeded}})
    return found


def test_sessions_with_trees_equal_those_of_plain_vllm(smollm2: Path) -> None:
    """Also where a turn ended with accepted drafts and the session went on from there, for each way to end."""
    engine = {
        "model": str(smollm2),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "async_scheduling": False,
    }
    asked = sessions()
    plain = run_script("run_sessions", {"engine": engine, "sessions": asked})
    # Of one size: what adaptive trees accept depends on how busy the machine is.
    spec = {"model": str(shipped_head()), "tree": "best_first", "draft_min_joint": 0.0}
    trees = run_script(
        "run_sessions", {"engine": {**engine, "speculative_config": spec}, "sessions": asked, "watch": True}
    )
    assert all(len(turns) == 4 for turns in plain["sessions"])
    assert {t["finish"] for turns in plain["sessions"] for t in turns} == {"stop", "length", "repetition"}
    assert trees["sessions"] == plain["sessions"]
    ends: Counter[str] = Counter()
    for turns, emitted in zip(trees["sessions"], trees["emitted"], strict=True):
        steps = [split(emitted, len(turn["tokens"])) for turn in turns]
        assert not emitted, "steps of no turn"
        for turn, own, following in zip(turns, steps, steps[1:], strict=False):
            ends[turn["finish"]] += own[-1] > 1
            ends["accepted again"] += own[-1] > 1 and max(following) > 1
    print(ends)
    assert all(ends[finish] > 0 for finish in ("stop", "length", "repetition")), ends
    assert ends["accepted again"] > len(asked) // 2


def split(emitted: list[int], count: int) -> list[int]:
    """Take from the numbers of tokens of steps those that give one turn, whose tokens they are to the last."""
    taken: list[int] = []
    while sum(taken) < count:
        taken.append(emitted.pop(0))
    assert sum(taken) == count, "a step's tokens belong to two turns"
    return taken
