"""What `clover-vllm bench` and `kernel` are asked for. Light: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from clover_vllm.base.command_line import Parsed, names, numbers
from clover_vllm.base.errors import UserError

LENGTHS = (0.5, 1.5)
"""Longest answers of a run's requests, over `max_tokens`: with one length for all, requests of an engine that does not
speculate would begin and end evenly apart, as no real ones do, and never wait for each other's prompts."""


@dataclass
class BenchSettings:
    """What `clover-vllm bench` was asked for.

    Args:
        methods: Compared with plain: ngram, suffix (needs arctic-inference), eagle, clover-chain, clover-published, clover, clover-head
            (nothing retrieved), clover-N (N nodes), hindsight (nodes chosen with the answers known: a bound).
        sweep: Choose each method's settings on prompts set aside for that.
        concurrency: Requests at a time, for example 1,4,16.
        repetitions: Runs per method and concurrency.
        server: Through `vllm serve` and `vllm bench serve` instead of LLM.
        target: Target; by default smollm2-135m.
        head: Clover-2 head; by default the shipped one.
        eagle_head: EAGLE head; by default the shipped one.
        prompts: families, text-heavy or prompt-heavy, or JSON lines with prompt_ids, messages or prompt; by default
            held out of the training answers.
        num_prompts: Prompts per run [at least 8, four times the concurrency].
        max_tokens: Longest answers, tokens, on average: each request's is between half and one and a half times that.
        temperature: 0 is greedy; else every request has a seed.
        dtype: auto, bfloat16, float16 or float32.
        enforce_eager: Without torch.compile.
        max_model_len: Longest prompt plus answer, tokens.
        output: JSON file, or a folder for bench.json; plots go beside it.
    """

    methods: Annotated[list[str], Parsed(names)] = field(
        default_factory=lambda: ["plain", "ngram", "eagle", "clover-chain", "clover"]
    )
    sweep: bool = False
    concurrency: Annotated[list[int], Parsed(numbers)] = field(default_factory=lambda: [1, 4, 16])
    repetitions: int = 3
    server: bool = False
    target: str | None = None
    head: str | None = None
    eagle_head: str | None = None
    prompts: str | None = None
    num_prompts: int | None = None
    max_tokens: int = 128
    temperature: float = 0.0
    dtype: str = "bfloat16"
    enforce_eager: bool = False
    max_model_len: int = 2048
    output: Path | None = None

    def per_run(self, concurrency: int) -> int:
        """Prompts of a run: at least 8, and four times the concurrency, of which two are timed."""
        return self.num_prompts or max(8, 4 * concurrency)

    def check(self) -> None:
        """
        Raises:
            UserError: a setting is impossible.
        """
        for name in ("max_tokens", "repetitions", "max_model_len"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be 1 or more.")
        if not self.concurrency or min(self.concurrency) < 1:
            raise UserError("--concurrency must be 1 or more.")
        if self.num_prompts is not None and self.num_prompts < 2 * max(self.concurrency):
            raise UserError(
                f"--num-prompts is {self.num_prompts}; it must be at least twice the largest --concurrency, "
                f"{max(self.concurrency)}, better four times."
            )
        if self.temperature < 0:
            raise UserError("--temperature must be 0 or more.")
        check_dtype(self.dtype, "auto")
        check_room(self.max_tokens, self.max_model_len)


@dataclass
class ClimbSettings:
    """What `clover-vllm climb` was asked for.

    Args:
        highest: Requests at a time at the top; the load doubles up to it and halves again.
        seconds: Length of a phase.
        repetitions: Climbs per method.
        target: Target; by default smollm2-135m.
        head: Clover-2 head; by default the shipped one.
        prompts: As for `bench`.
        max_tokens: Longest answers, tokens, on average, as for `bench`.
        temperature: 0 is greedy; else every request has a seed.
        dtype: auto, bfloat16, float16 or float32.
        max_model_len: Longest prompt plus answer, tokens.
        output: JSON file, or a folder for climb.json; a plot goes beside it.
    """

    highest: int = 64
    seconds: float = 10.0
    repetitions: int = 3
    target: str | None = None
    head: str | None = None
    prompts: str | None = None
    max_tokens: int = 96
    temperature: float = 0.0
    dtype: str = "bfloat16"
    max_model_len: int = 2048
    output: Path | None = None

    def check(self) -> None:
        """
        Raises:
            UserError: a setting is impossible.
        """
        for name in ("highest", "repetitions", "max_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be 1 or more.")
        if self.seconds <= 0:
            raise UserError("--seconds must be more than 0.")
        if self.temperature < 0:
            raise UserError("--temperature must be 0 or more.")
        check_dtype(self.dtype, "auto")
        check_room(self.max_tokens, self.max_model_len)


@dataclass
class KernelSettings:
    """What `clover-vllm kernel` was asked for.

    Args:
        requests: Requests in the step, for example 1,4,16.
        contexts: Tokens in the cache per request.
        rows: Root and nodes of each request.
        dtype: bfloat16, float16 or float32.
        output: JSON file, or a folder for kernel.json.
    """

    requests: Annotated[list[int], Parsed(numbers)] = field(default_factory=lambda: [1, 4, 16])
    contexts: Annotated[list[int], Parsed(numbers)] = field(default_factory=lambda: [100, 300, 1000, 2000])
    rows: Annotated[int, typer.Option(min=1, max=64)] = 9
    dtype: str = "bfloat16"
    output: Path | None = None

    def check(self) -> None:
        """
        Raises:
            UserError: a setting is impossible.
        """
        check_dtype(self.dtype)
        for name in ("requests", "contexts"):
            if min(getattr(self, name)) < 1:
                raise UserError(f"--{name} must be 1 or more.")


@dataclass
class OverheadSettings:
    """What `clover-vllm overhead` was asked for.

    Args:
        requests: Requests in the batch.
        steps: Steps that are timed.
        output: JSON file, or a folder for overhead.json.
    """

    requests: Annotated[list[int], Parsed(numbers)] = field(default_factory=lambda: [64, 256])
    steps: Annotated[int, typer.Option(min=1)] = 100
    output: Path | None = None


@dataclass
class KernelsCompiledSettings:
    """What `clover-vllm kernels-compiled` was asked for.

    Args:
        capabilities: Compute capabilities of GPUs: 80 (A100), 89 (L4), 90 (H100), 100 (B200).
        output: JSON file, or a folder for kernels-compiled.json.
    """

    capabilities: Annotated[list[int], Parsed(numbers)] = field(default_factory=lambda: [80, 89, 90, 100])
    output: Path | None = None

    def check(self) -> None:
        """
        Raises:
            UserError: a GPU that is not known.
        """
        if unknown := sorted(set(self.capabilities) - {80, 89, 90, 100}):
            raise UserError(f"--capabilities has {unknown[0]}; choose from 80, 89, 90 and 100.")


def longest_answer(usual: int, share: float) -> int:
    """Tokens of an answer at most, where `usual` is the mean."""
    return max(1, round(usual * share))


def check_room(max_tokens: int, max_model_len: int) -> None:
    """Refuse answers that leave no room for prompts.

    Raises:
        UserError: they do.
    """
    longest = longest_answer(max_tokens, LENGTHS[1])
    if longest >= max_model_len:
        raise UserError(
            f"--max-tokens is {max_tokens}: answers get up to {longest} tokens, which leaves no room for a prompt within "
            f"--max-model-len {max_model_len}."
        )


def check_dtype(dtype: str, *more: str) -> None:
    """Refuse what is no dtype of a target.

    Raises:
        UserError: it is none of float32, bfloat16, float16 and `more`.
    """
    known = ("float32", "bfloat16", "float16", *more)
    if dtype not in known:
        raise UserError(f"--dtype is {dtype!r}; choose from {', '.join(known)}.")
