"""The EAGLE-1 baseline serves in vLLM's own `eagle` method."""

from __future__ import annotations

from pathlib import Path

import torch
from engines import run_engine, tokens_of
from pairs import llm

from clover_vllm.heads.clover2.init import config_for_target
from clover_vllm.heads.eagle1.checkpoint import save_eagle1
from clover_vllm.heads.eagle1.init import init_eagle1
from clover_vllm.heads.eagle1.model import Eagle1DraftModel
from clover_vllm.target.frozen import FrozenTarget


def test_vllm_loads_the_eagle1_head_and_says_what_the_target_says(
    tiny_target: Path, frozen: FrozenTarget, tmp_path: Path
) -> None:
    head = Eagle1DraftModel(config_for_target(frozen.config))
    init_eagle1(head)
    save_eagle1(head, tmp_path / "eagle", tiny_target)
    prompts = [[3 + i, 50, 60 + i, 9] for i in range(6)]
    params = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
    eagle = {"method": "eagle", "model": str(tmp_path / "eagle"), "num_speculative_tokens": 3}
    run = run_engine(
        llm(tiny_target, max_model_len=128, speculative_config=eagle),
        [{"prompt": prompt, "params": params} for prompt in prompts],
    )
    for ids, (answer,) in zip(prompts, tokens_of(run), strict=True):
        assert len(answer) == 20
        for token in answer:
            hidden = frozen.hidden_states(torch.tensor([ids]))
            assert int((frozen.norm(hidden)[0, -1] @ frozen.lm_head.T).argmax()) == token
            ids.append(token)
