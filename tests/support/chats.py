"""Chats with a tiny target, as lines of OpenAI's batch files, and what was answered."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

TINY_FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"]
TINY_FLAGS += ["--num-gpu-blocks-override", "256", "--block-size", "32", "--served-model-name", "small"]
"""Of `vllm run-batch` for a tiny target."""


def chat_lines(count: int, plain: bool = False) -> list[Json]:
    """Greedy and seeded chats, half of each.

    Args:
        count: of them.
        plain: one answer each and no more; otherwise some ask for several samples or logprobs, and the fifth is refused.
    """
    made = []
    for i in range(count):
        content = " ".join(f"t{3 + (17 * i + 5 * j) % 200}" for j in range(8))
        body: Json = {"model": "small", "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": 30, "ignore_eos": True}
        body |= {"temperature": 0.8, "seed": i} if i % 2 else {"temperature": 0}
        if not plain:
            body |= {"n": 1 + i % 3} if i % 2 else {}
            body |= {"logprobs": True} if i % 5 == 0 else {}
            body |= {"top_p": 9} if i == 4 else {}
        made.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    return made
