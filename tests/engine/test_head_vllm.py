"""The head inside vLLM computes what the reference model computes (float32)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import run_engine, tokens_of
from pairs import VOCAB, llm, make_pair, random_requests, speculative

from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import save_head
from clover_vllm.heads.clover2.config import Clover2Config


@pytest.mark.parametrize(
    ("family", "draft_vocab", "eager"),
    [("llama tied", None, True), ("qwen2", 90, True), ("llama tied", 90, False)],
)
def test_head_in_vllm_equals_the_reference(
    family: str, draft_vocab: int | None, eager: bool, tmp_path: Path
) -> None:
    """Prefill, chunked prefill, prefix hits, preemptions, accepted paths, one request and many, compiled and not."""
    target, folder = make_pair(tmp_path, family)
    config = Clover2Config.from_pretrained(folder)
    config.draft_vocab_size = draft_vocab
    torch.manual_seed(7)
    head = Clover2DraftModel(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
    if draft_vocab is not None:
        head.draft_vocab = torch.randperm(VOCAB)[:draft_vocab].sort().values
    save_head(head, tmp_path / "random")
    requests = random_requests(24)
    plain = run_engine(llm(target), requests)
    run = run_engine(
        llm(
            target,
            enforce_eager=eager,
            max_num_batched_tokens=48,
            num_gpu_blocks_override=14,
            speculative_config=speculative(tmp_path / "random", draft_min_joint=0.0),
        ),
        requests,
        scripted={"answers": tokens_of(plain), "seed": 5},
        check_head=str(tmp_path / "random"),
    )
    stats = run["stats"]
    assert stats["preempted"] > 0
    assert stats["cached_tokens"] > 0
    assert set(stats["head_errors"]) == {"prefill", "chunk", "decode", "first", "expand"}
    assert all(rows > 100 for rows in stats["head_rows"].values()), stats["head_rows"]
    assert max(stats["head_errors"].values()) < 1e-4, stats["head_errors"]
