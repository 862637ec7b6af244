"""Chats through vLLM, greedily, in a process of its own; `engines.run_script` starts it.

`main` takes {"target": folder, "prompts": [text]} and returns the answers' token ids.
"""

from __future__ import annotations

from typing import Any

from clover_vllm.train.generate import start_engine


def main(spec: dict[str, Any]) -> list[list[int]]:
    from vllm import SamplingParams

    llm = start_engine(spec["target"], dtype="float32", max_model_len=512, max_num_seqs=8, enforce_eager=True)
    chats = [[{"role": "user", "content": prompt}] for prompt in spec["prompts"]]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=48), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
