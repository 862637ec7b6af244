"""The EAGLE-1 baseline serves in vLLM's own `eagle` method."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from clover_vllm.heads.clover2.init import config_for_target
from clover_vllm.heads.eagle1.checkpoint import save_eagle1
from clover_vllm.heads.eagle1.init import init_eagle1
from clover_vllm.heads.eagle1.model import Eagle1DraftModel
from clover_vllm.target.frozen import FrozenTarget

_WORKER = """
import json, sys
from clover_vllm.train.generate import start_engine
if __name__ == "__main__":
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    target, head = sys.argv[1:3]
    llm = start_engine(
        target, dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=True,
        skip_tokenizer_init=True,
        speculative_config={"method": "eagle", "model": head, "num_speculative_tokens": 3},
    )
    prompts = [TokensPrompt(prompt_token_ids=[3 + i, 50, 60 + i, 9]) for i in range(6)]
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False), use_tqdm=False
    )
    print("ANSWERS" + json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


def test_vllm_loads_the_eagle1_head_and_says_what_the_target_says(
    tiny_target: Path, frozen: FrozenTarget, tmp_path: Path
) -> None:
    head = Eagle1DraftModel(config_for_target(frozen.config))
    init_eagle1(head)
    save_eagle1(head, tmp_path / "eagle", tiny_target)
    worker = tmp_path / "worker.py"
    worker.write_text(_WORKER)
    command = [sys.executable, str(worker), str(tiny_target), str(tmp_path / "eagle")]
    done = subprocess.run(command, capture_output=True, text=True)
    line = next((x for x in done.stdout.splitlines() if x.startswith("ANSWERS")), None)
    assert line, done.stderr[-3000:]
    for i, answer in enumerate(json.loads(line.removeprefix("ANSWERS"))):
        ids = [3 + i, 50, 60 + i, 9]
        for token in answer:
            hidden = frozen.hidden_states(torch.tensor([ids]))
            assert int((frozen.norm(hidden)[0, -1] @ frozen.lm_head.T).argmax()) == token
            ids.append(token)
