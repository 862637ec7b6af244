"""Trees of changing sizes, drafting that sleeps and wakes, and two sources never change what the target says."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import assert_only_drafts_are_scored, run_engine, tokens_of
from length import length
from pairs import llm, make_pair, random_requests, speculative

OPTIONS = {"tree": "adaptive", "num_speculative_tokens": 16}


@pytest.mark.parametrize("sampled", [False, True])
def test_text_stays_the_same_whatever_is_drafted(sampled: bool, tmp_path: Path) -> None:
    """Float32; prompts in chunks, preemptions, shared prefixes; greedy, or seeded at temperature 0.8."""
    target, head = make_pair(tmp_path, "llama tied")
    requests = random_requests(length(24, 240))
    for i, request in enumerate(requests):
        request["params"] |= {"max_tokens": 90}
        request["params"] |= {"temperature": 0.8, "seed": i, "top_p": 0.9} if sampled else {}
    settings = {"num_gpu_blocks_override": 24, **({} if sampled else {"max_num_batched_tokens": 64})}
    plain = run_engine(llm(target, **settings), requests)
    run = run_engine(
        llm(target, **settings, speculative_config=speculative(head, **OPTIONS, backlog_mib=1)),
        requests,
        restless=3,
        scripted={"answers": tokens_of(plain), "seed": 5, "share": 0.4, "rest": 0.15},
    )
    assert tokens_of(run) == tokens_of(plain)
    stats = run["stats"]
    assert stats["restless"]["slept"] > 5
    assert stats["restless"]["asked"] > 50
    assert stats["restless"]["sizes"] > 5
    assert_only_drafts_are_scored(stats)
    assert stats["accepted"] > 100
    assert stats["sources"]["nodes"]["head"] > 50
    assert stats["sources"]["nodes"]["retrieved"] > 10
    assert stats["labels"]["right"] > 30
    assert stats["labels"]["wrong"] == 0


@pytest.mark.parametrize("window", [16, 40, 10_000])
def test_the_head_reads_what_it_slept_through(tmp_path: Path, window: int) -> None:
    """What it computes after it wakes is what the reference computes of the part in view, whatever it has missed."""
    target, head = make_pair(tmp_path, "llama tied")
    requests = random_requests(24)
    plain = run_engine(llm(target), requests)
    run = run_engine(
        llm(
            target,
            max_num_batched_tokens=48,
            num_gpu_blocks_override=14,
            speculative_config=speculative(head, **OPTIONS, read_window=window),
        ),
        requests,
        restless=4,
        scripted={"answers": tokens_of(plain), "seed": 5, "share": 0.5},
        check_head=str(head),
    )
    assert tokens_of(run) == tokens_of(plain)
    stats = run["stats"]
    assert stats["preempted"] > 0
    assert stats["cached_tokens"] > 0
    assert stats["restless"]["slept"] > 5
    assert max(stats["head_errors"].values()) < 1e-4, stats["head_errors"]
    assert stats["head_rows"]["decode"] > 200
