"""Stream an answer from a running `vllm serve`: `python examples/client.py "Why is the sky blue?"`.

Start the server with the command of the README's quick start.
"""

from __future__ import annotations

import argparse

from openai import OpenAI


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", nargs="?", default="Why is the sky blue?")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--model", default="small", help="the server's --served-model-name")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer, tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    return parser.parse_args(arguments)


def main() -> None:
    """Ask, and print the answer as it comes."""
    options = parse()
    chunks = OpenAI(base_url=options.url, api_key="none").chat.completions.create(
        model=options.model,
        messages=[{"role": "user", "content": options.question}],
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        stream=True,
    )
    for chunk in chunks:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
