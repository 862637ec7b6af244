"""Real engines under Ray Serve, killed at random moments. Minutes: in the full form alone; the short one has stand-ins."""

from __future__ import annotations

import json
import os
from pathlib import Path

from chats import TINY_FLAGS, chat_lines
from engines import Json, run_script
from length import FULL
from pairs import make_pair
from small import add_tokenizer

SUPPORT = Path(__file__).parents[1] / "support"


def chaos(tmp_path: Path) -> None:
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
    asked = {"target": str(target), "head": str(head), "requests": requests, "kills": 6, "seed": 0}
    seen: Json = run_script("run_ray_engines", asked, timeout=1500, env={"PYTHONPATH": paths})
    assert seen["quiet"] == plain[:12]
    assert len(seen["noisy"]) >= 200
    assert all(found == plain[i % 40] for i, found in enumerate(seen["noisy"]))
    assert len(seen["killed"]) == 6
    assert seen["orphans"] == []
    metrics = seen["metrics"]
    for ours, vllms in (
        ("tree_nodes_count_total", "num_drafts_total"),
        ("tree_nodes_sum_total", "num_draft_tokens_total"),
        ("accepted_depth_total", "num_accepted_tokens_total"),
    ):
        assert metrics[f"ray_clover_{ours}"] == metrics[f"ray_vllm_spec_decode_{vllms}"] > 0


if FULL:
    test_chaos_loses_no_request_and_leaves_no_orphan = chaos
