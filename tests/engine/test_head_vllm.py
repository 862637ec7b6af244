"""The head inside vLLM computes what the reference model computes (float32)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Json, differing, run_engine, tokens_of
from pairs import VOCAB, llm, make_pair, random_requests, speculative

from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import save_head
from clover_vllm.heads.clover2.config import Clover2Config


def compare(
    folder: Path,
    family: str,
    draft_vocab: int | None,
    requests: list[Json],
    share: float,
    fields: Json | None = None,
    **settings: Any,
) -> Json:
    """Check a random head in an engine, and return plain vLLM's answers and those of the engine."""
    target, untrained = make_pair(folder, family)
    config = Clover2Config.from_pretrained(untrained, **(fields or {}))
    config.draft_vocab_size = draft_vocab
    torch.manual_seed(7)
    head = Clover2DraftModel(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
    if draft_vocab is not None:
        head.draft_vocab = torch.randperm(VOCAB)[:draft_vocab].sort().values
    save_head(head, folder / "random")
    plain = run_engine(llm(target, max_num_batched_tokens=4096), requests)
    settings["speculative_config"]["model"] = str(folder / "random")
    run = run_engine(
        llm(target, max_num_batched_tokens=48, num_gpu_blocks_override=14, **settings),
        requests,
        scripted={"answers": tokens_of(plain), "seed": 5, "share": share},
        check_head=str(folder / "random"),
    )
    stats = run["stats"]
    assert stats["preempted"] > 0
    assert stats["cached_tokens"] > 0
    assert set(stats["head_errors"]) == {"prefill", "chunk", "decode", "first", "expand"}
    assert all(rows > 100 for rows in stats["head_rows"].values()), stats["head_rows"]
    assert max(stats["head_errors"].values()) < 1e-4, stats["head_errors"]
    return {"plain": plain, "run": run}


@pytest.mark.parametrize(("family", "draft_vocab"), [("llama tied", None), ("qwen2", 90)])
def test_head_in_vllm_equals_the_reference(family: str, draft_vocab: int | None, tmp_path: Path) -> None:
    """Prefill, chunked prefill, prefix hits, preemptions, accepted paths, one request and many."""
    spec = speculative(tmp_path, draft_min_joint=0.0)
    compare(tmp_path, family, draft_vocab, random_requests(24), 1.0, speculative_config=spec)


def test_states_are_normed_and_earlier_layers_are_read_as_in_the_reference(tmp_path: Path) -> None:
    fields = {"norm_state": True, "target_layers": [0, 1]}
    spec = speculative(tmp_path, draft_min_joint=0.0)
    compare(tmp_path, "llama tied", 90, random_requests(24), 1.0, fields, speculative_config=spec)


def test_method_is_inferred_from_the_head_and_compiled_targets_and_heads_work(tmp_path: Path) -> None:
    """The same without "method", with torch.compile; half of the trees are the head's own; also with seeded
    prompts in chunks, which end plain vLLM 0.32.0."""
    requests = random_requests(24)
    requests += random_requests(8, temperature=0.9, seed=5)
    spec = {"draft_min_joint": 0.0, "tree": "best_first", "num_speculative_tokens": 8}
    found = compare(tmp_path, "llama tied", 90, requests, 0.5, enforce_eager=False, speculative_config=spec)
    assert found["run"]["stats"]["worker"] == "CloverCPUWorker"
    assert found["run"]["stats"]["verified"]["branching"] > 100
    assert found["run"]["stats"]["accepted"] > 100
    assert differing(found["plain"], found["run"]) == 0
