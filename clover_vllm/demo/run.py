"""`clover-vllm demo`: `vllm serve` with Clover-2 and without, asked by the openai client."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clover_vllm.base.paths import shipped_head
from clover_vllm.base.show import print_table
from clover_vllm.bench.through_server import COUNTERS
from clover_vllm.demo.trees import PROMPTS
from clover_vllm.launch.server import Server
from clover_vllm.target.make import make_target

FLAGS = ["--max-model-len", "2048", "--max-num-seqs", "8", "--no-enable-log-requests"]
NAME = "smollm2-135m"


@dataclass
class Chat:
    """What a server said (filled by `_ask`)."""

    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_step: float = 1.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run_demo(num_prompts: int, max_tokens: int, nodes: int) -> None:
    """Start both servers in turn, ask the same questions, and compare.

    Raises:
        UserError: the target cannot be made, or a server does not start.
    """
    console = Console(highlight=False)
    console.print("[bold]1. Target[/bold]  SmolLM2-135M-Instruct (made on first use)")
    target, head = str(make_target(NAME)), str(shipped_head())
    clover = {"method": "clover2", "model": head, "num_speculative_tokens": nodes}
    prompts = PROMPTS[:num_prompts]
    chats = []
    for number, (title, speculative) in enumerate((("Plain vLLM", None), ("Clover-2", clover)), start=2):
        shown = {**speculative, "model": Path(head).name} if speculative else None
        flag = f" --speculative-config '{json.dumps(shown)}'" if shown else ""
        console.print(f"[bold]{number}. {title}[/bold]  vllm serve {NAME}{escape(flag)}")
        with Server(target, speculative, FLAGS, NAME) as server:
            with console.status("waiting for /health (a minute or two: the first start compiles the model)"):
                server.wait()
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
            _ask(client, prompts[:1], 16, None)  # the first request of a server is slow
            before = server.counters()
            chats.append(_ask(client, prompts, max_tokens, console if speculative else None))
            after = server.counters()
            drafts, accepted = (
                after.get(COUNTERS[k], 0) - before.get(COUNTERS[k], 0) for k in ("drafts", "accepted")
            )
            if drafts:
                chats[-1].tokens_per_step = 1 + accepted / drafts
    plain, fast = chats
    found = Table(title=f"{len(prompts)} chat requests, one after the other, greedy, streamed")
    for name in ("", "tokens", "tokens/s", "tokens per step", "speed-up"):
        found.add_column(name, justify="left" if not name else "right")
    for title, chat in (("plain vLLM", plain), (f"Clover-2, {nodes} nodes", fast)):
        found.add_row(
            title,
            str(chat.tokens),
            f"{chat.rate:.1f}",
            f"{chat.tokens_per_step:.2f}",
            f"{chat.rate / plain.rate:.2f}",
        )
    print_table(found)
    same = sum(a == b for a, b in zip(plain.texts, fast.texts, strict=True))
    console.print(
        f"{same} of {len(prompts)} texts are the same to the letter. The others part where two tokens nearly tie: "
        "bfloat16 rounds differently with the number of rows in a step, so that plain vLLM's text depends on the "
        "batch too. In float32 texts are equal. What is said is as good as a model of 135 million parameters."
    )


def _ask(client: OpenAI, prompts: list[str], max_tokens: int, console: Console | None) -> Chat:
    """Ask one question after the other, streaming; text goes to the console."""
    chat = Chat()
    for prompt in prompts:
        if console is not None:
            console.print(f"\n[bold cyan]> {escape(prompt)}[/bold cyan]")
        started = time.perf_counter()
        stream = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
        )
        text = ""
        for event in stream:
            piece = (event.choices[0].delta.content or "") if event.choices else ""
            text += piece
            if console is not None:
                console.print(piece, end="", markup=False)
            if event.usage is not None:
                chat.tokens += event.usage.completion_tokens
        chat.seconds += time.perf_counter() - started
        chat.texts.append(text)
        if console is not None:
            console.print()
    return chat
