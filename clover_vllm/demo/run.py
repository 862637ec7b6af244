"""`clover-vllm demo`: `vllm serve` with Clover-2 and without, asked by the openai client."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

NAME = "smollm2-135m"
FLAGS = ["--max-model-len", "2048", "--max-num-seqs", "8", "--no-enable-log-requests"]
FAST = [*FLAGS, "--dtype", "bfloat16"]
EXACT = [*FLAGS, "--dtype", "float32", "--enforce-eager"]
CANDIDATES = 20
"""Likeliest tokens that plain vLLM names per position."""


@dataclass
class Chat:
    """What a server said while it was timed (filled by `_ask`)."""

    answers: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_step: float = 1.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Position:
    """One token of plain vLLM's, and the log-probabilities of the likeliest ones there by token."""

    token: int
    likeliest: dict[int, float]


@dataclass(frozen=True)
class Parting:
    """Where a text leaves plain vLLM's.

    Args:
        position: of the first token that differs, from 1.
        gap: plain vLLM's logit of its own token less that of the other one; at least that, where the other is
            not among the likeliest. None where one text merely ends before the other.
    """

    position: int
    gap: float | None


def parting(plain: Sequence[Position], other: Sequence[int]) -> Parting | None:
    """The first difference, or None if the texts are the same token for token."""
    for i, (own, token) in enumerate(zip(plain, other, strict=False), start=1):
        if own.token != token:
            lowest = min(own.likeliest.values())
            return Parting(i, own.likeliest[own.token] - own.likeliest.get(token, lowest))
    if len(plain) != len(other):
        return Parting(min(len(plain), len(other)) + 1, None)
    return None


def run_demo(num_prompts: int, max_tokens: int) -> None:
    """Start servers in turn, ask the same questions, and compare: speed in bfloat16, texts in float32 too.

    Raises:
        UserError: the target cannot be made, or a server does not start.
    """
    console = Console(highlight=False)
    console.print("[bold]1. Target[/bold]  SmolLM2-135M-Instruct (made on first use)")
    target, head = str(make_target(NAME)), str(shipped_head())
    clover = {"method": "clover2", "model": head}
    shown = escape(json.dumps({**clover, "model": Path(head).name}))
    prompts = PROMPTS[:num_prompts]
    console.print(f"[bold]2. Plain vLLM, bfloat16[/bold]  vllm serve {NAME}")
    with _serving(console, target, None, FAST) as server:
        plain = _timed(server, prompts, max_tokens, None)
        references = {"bfloat16": _reference(server, prompts, max_tokens)}
    console.print(f"[bold]3. Clover-2, bfloat16[/bold]  vllm serve {NAME} --speculative-config '{shown}'")
    with _serving(console, target, clover, FAST) as server:
        fast = _timed(server, prompts, max_tokens, console)
    answers = {"bfloat16": fast.answers}
    console.print("\n[bold]4. Both again in float32[/bold], where rounding hides nothing")
    with _serving(console, target, None, EXACT) as server:
        references["float32"] = _reference(server, prompts, max_tokens)
    with _serving(console, target, clover, EXACT) as server:
        answers["float32"] = _timed(server, prompts, max_tokens, None).answers
    print_table(_speed(plain, fast, len(prompts)))
    print_table(exactness({dtype: (references[dtype], answers[dtype]) for dtype in ("float32", "bfloat16")}))
    console.print(
        "Every token is the model's own choice. bfloat16 rounds differently with the number of rows in a step, so where "
        "two tokens nearly tie, either may win, in plain vLLM as well when its batch changes; one such token "
        "changes all that follows. What is said is as good as a model of 135 million parameters."
    )


def _speed(plain: Chat, fast: Chat, count: int) -> Table:
    found = Table(title=f"{count} chat requests, one after the other, greedy, streamed, bfloat16")
    for name in ("", "tokens", "tokens/s", "tokens per step", "speed-up"):
        found.add_column(name, justify="left" if not name else "right")
    for title, chat in (("plain vLLM", plain), ("Clover-2", fast)):
        found.add_row(
            title,
            str(chat.tokens),
            f"{chat.rate:.1f}",
            f"{chat.tokens_per_step:.2f}",
            f"{chat.rate / plain.rate:.2f}",
        )
    return found


def exactness(by_dtype: Mapping[str, tuple[Sequence[Sequence[Position]], Sequence[Sequence[int]]]]) -> Table:
    """How many texts equal plain vLLM's, and where and by how little the others part.

    Args:
        by_dtype: plain vLLM's answers and those to compare.
    """
    found = Table(title="Texts that equal plain vLLM's, token for token")
    for name in ("dtype", "equal", "the others part at"):
        found.add_column(name)
    for dtype, (plain, other) in by_dtype.items():
        partings = [parting(a, b) for a, b in zip(plain, other, strict=True)]
        said = [
            f"token {p.position} (" + ("one ends)" if p.gap is None else f"logits {p.gap:.3f} apart)")
            for p in partings
            if p is not None
        ]
        found.add_row(dtype, f"{partings.count(None)} of {len(partings)}", "\n".join(said))
    return found


@contextmanager
def _serving(
    console: Console, target: str, speculative: dict[str, Any] | None, flags: list[str]
) -> Iterator[Server]:
    with Server(target, speculative, flags, NAME) as server:
        with console.status("waiting for /health (a minute or two: the first start compiles the model)"):
            server.wait()
        yield server


def _client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none")


def _timed(server: Server, prompts: list[str], max_tokens: int, console: Console | None) -> Chat:
    """Ask all questions, with what vLLM counted meanwhile."""
    client = _client(server)
    _ask(client, prompts[:1], 16, None)  # the first request of a server is slow
    before = server.counters()
    chat = _ask(client, prompts, max_tokens, console)
    after = server.counters()
    drafts, accepted = (
        after.get(COUNTERS[k], 0) - before.get(COUNTERS[k], 0) for k in ("drafts", "accepted")
    )
    if drafts:
        chat.tokens_per_step = 1 + accepted / drafts
    return chat


def _reference(server: Server, prompts: list[str], max_tokens: int) -> list[list[Position]]:
    """Plain vLLM's answers with the likeliest tokens at each position."""
    client = _client(server)
    found = []
    for prompt in prompts:
        answer = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=max_tokens,
            logprobs=True,
            top_logprobs=CANDIDATES,
            extra_body={"return_tokens_as_token_ids": True},
        )
        content = answer.choices[0].logprobs.content if answer.choices[0].logprobs else None
        found.append(
            [
                Position(
                    _token(p.token),
                    {_token(p.token): p.logprob} | {_token(c.token): c.logprob for c in p.top_logprobs},
                )
                for p in content or []
            ]
        )
    return found


def _token(named: str) -> int:
    """`token_id:42` as a number."""
    return int(named.removeprefix("token_id:"))


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
            extra_body={"return_token_ids": True},
        )
        answer: list[int] = []
        for event in stream:
            piece = (event.choices[0].delta.content or "") if event.choices else ""
            answer += (getattr(event.choices[0], "token_ids", None) or []) if event.choices else []
            if console is not None:
                console.print(piece, end="", markup=False)
            if event.usage is not None:
                chat.tokens += event.usage.completion_tokens
        chat.seconds += time.perf_counter() - started
        chat.answers.append(answer)
        if console is not None:
            console.print()
    return chat
