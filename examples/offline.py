"""Answer prompts with vLLM's Python interface and the shipped head: `python examples/offline.py`."""

from __future__ import annotations

import argparse

from clover_vllm.base.paths import shipped_head
from clover_vllm.launch.environment import prepare
from clover_vllm.target.make import make_target

QUESTIONS = (
    "Why is the sky blue?",
    "Write a Python function that returns the n-th Fibonacci number.",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-tokens", type=int, default=128, help="longest answer, tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    return parser.parse_args(arguments)


def main() -> None:
    """Start an engine, ask, and print."""
    options = parse()
    prepare()  # before vLLM is imported: its processes inherit the settings
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(make_target("smollm2-135m")),
        speculative_config={"model": str(shipped_head())},
        enforce_eager=True,  # starts faster; leave it out where speed matters
    )
    params = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens, seed=0)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    for question, answer in zip(QUESTIONS, llm.chat(chats, params), strict=True):
        print(f"\n> {question}\n{answer.outputs[0].text}")


if __name__ == "__main__":  # vLLM starts processes, which import this file again
    main()
