"""What `clover-vllm bench` does."""

from __future__ import annotations

import gzip
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from clover_vllm.base.errors import UserError
from clover_vllm.base.paths import shipped_head
from clover_vllm.base.show import print_table
from clover_vllm.bench import report, through_llm, through_server
from clover_vllm.bench.methods import select
from clover_vllm.target.make import make_target

logger = logging.getLogger(__name__)

WARM_UP = 4
"""Requests per engine that are not measured."""


@dataclass
class BenchSettings:
    """What `clover-vllm bench` was asked for."""

    target: str | None
    head: str | None
    eagle_head: str | None
    methods: list[str]
    prompts: Path | None
    num_prompts: int
    max_tokens: int
    temperature: float
    concurrency: list[int]
    repetitions: int
    dtype: str
    enforce_eager: bool
    max_model_len: int
    server: bool
    output: Path | None


def bench(settings: BenchSettings) -> None:
    """Measure, print a table, write JSON and plots.

    Raises:
        UserError: anything that the user can mend.
    """
    for name in ("num_prompts", "max_tokens", "repetitions", "max_model_len"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more.")
    if not settings.concurrency or min(settings.concurrency) < 1:
        raise UserError("--concurrency must be 1 or more.")
    if settings.temperature < 0:
        raise UserError("--temperature must be 0 or more.")
    check_dtype(settings.dtype, "auto")
    methods = select(settings.methods, settings.head, settings.eagle_head)
    target = settings.target or str(make_target("smollm2-135m"))
    source = settings.prompts or shipped_head() / "held-out.jsonl.gz"
    room = settings.max_model_len - settings.max_tokens
    runs = len(settings.concurrency) * settings.repetitions
    prompts = read_prompts(source, settings.num_prompts * runs + WARM_UP, room, target)
    portions, warm_up = share_out(prompts, settings.num_prompts, runs)
    if sum(map(len, portions)) > len(prompts):
        logger.warning(
            "%s runs of %s prompts repeat the %s of %s: methods that remember earlier answers (suffix) gain "
            "from that.",
            runs,
            len(portions[0]),
            len(prompts),
            source.name,
        )
    llm: dict[str, Any] = {
        "model": target,
        "dtype": settings.dtype,
        "enforce_eager": settings.enforce_eager,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": max(settings.concurrency),
        "disable_log_stats": False,
    }
    if Path(target).is_dir() and not any(Path(target).glob("tokenizer*")):
        llm["skip_tokenizer_init"] = True  # prompts are token ids
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    header: dict[str, Any]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        if settings.server:
            comparison = through_server.measure(
                methods,
                llm,
                portions,
                warm_up,
                settings.max_tokens,
                settings.temperature,
                settings.concurrency,
                settings.repetitions,
                progress,
            )
        else:
            plan = through_llm.Plan(
                methods,
                llm,
                [_requests(portion, settings) for portion in portions],
                _requests(warm_up, settings),
                settings.concurrency,
                settings.repetitions,
            )
            comparison = report.Comparison(through_llm.measure(plan, progress))
    header = {
        **report.environment([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "through": "vllm serve and vllm bench serve" if settings.server else "LLM",
        "methods": {method.name: _public(method.speculative) for method in methods},
        "engine": _public(llm),
        "prompts": {
            "file": source.name,
            "distinct": len(prompts),
            "per_run": len(portions[0]),
            "tokens": sum(map(len, prompts)),
        },
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
    }
    for found in (report.table(comparison), *([] if settings.server else [report.split_table(comparison)])):
        print_table(found)
    if settings.output is not None:
        report.write(comparison, settings.output, header)
        console.print(f"Written: {settings.output / 'bench.json'} and plots.", highlight=False)


Prompts = list[list[int]]
"""Token ids."""


def share_out(prompts: Prompts, per_run: int, runs: int) -> tuple[list[Prompts], Prompts]:
    """Prompts for each run, and those to warm engines up with.

    No prompt is asked twice while there are enough: suffix decoding drafts from earlier answers, and would
    be measured at repeating them. Where there are too few they go round.

    Args:
        prompts: one or more.
        per_run: wanted per run; with fewer prompts than that, each run asks all of them once.
        runs: how many.
    """
    size = min(per_run, len(prompts))
    portions = [[prompts[(run * size + i) % len(prompts)] for i in range(size)] for run in range(runs)]
    spare = prompts[size * runs :] or prompts
    return portions, spare[:WARM_UP]


def _requests(prompts: Prompts, settings: BenchSettings) -> list[dict[str, Any]]:
    """Requests of `bench.worker`."""
    params = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
    seeds = [{"seed": i} if settings.temperature else {} for i in range(len(prompts))]
    return [
        {"prompt": prompt, "params": {**params, **seed}} for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def read_prompts(path: Path, count: int, longest: int, target: str) -> list[list[int]]:
    """Token ids of the first prompts that fit.

    Args:
        path: JSON lines, plain or gzipped, with `prompt_ids`, or `messages` or `prompt` as text that
            goes through the target's chat template.
        count: most prompts.
        longest: prompts with more tokens are passed over.
        target: whose tokenizer reads text.

    Raises:
        UserError: the file cannot be read, or holds too few.
    """
    tokenizer: Any = None
    found: list[list[int]] = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for line in file:
                if len(found) == count:
                    break
                row = json.loads(line)
                if "prompt_ids" in row:
                    ids = row["prompt_ids"]
                else:
                    if tokenizer is None:
                        from transformers import AutoTokenizer

                        tokenizer = AutoTokenizer.from_pretrained(target)
                    messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
                    ids = tokenizer.apply_chat_template(
                        messages, add_generation_prompt=True, return_dict=True
                    )["input_ids"]
                if 0 < len(ids) <= longest:
                    found.append(list(ids))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as JSON lines with prompt_ids, messages or prompt "
            f"({type(error).__name__})."
        ) from None
    if not found:
        raise UserError(f"{path} holds no prompt of at most {longest} tokens.")
    return found


def _public(settings: dict[str, Any] | None) -> dict[str, Any] | None:
    """Settings with the names of local folders alone."""
    if settings is None:
        return None
    return {k: Path(v).name if k == "model" else v for k, v in settings.items()}


def parse_list(text: str) -> list[int]:
    """`1,2,4` as numbers.

    Raises:
        UserError: it is something else.
    """
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"{text!r} is not a list of whole numbers such as 1,2,4.") from None


def check_dtype(dtype: str, *more: str) -> None:
    """Refuse what is no dtype of a target.

    Raises:
        UserError: it is none of float32, bfloat16, float16 and `more`.
    """
    known = ("float32", "bfloat16", "float16", *more)
    if dtype not in known:
        raise UserError(f"--dtype is {dtype!r}; choose from {', '.join(known)}.")


def names(text: str) -> list[str]:
    """`plain,clover-8` as names."""
    return [part.strip() for part in text.split(",") if part.strip()]
