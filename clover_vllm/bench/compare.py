"""What `clover-vllm bench` does."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.base.paths import shipped_head
from clover_vllm.base.progress import Work
from clover_vllm.base.prompts import each_prompt, token_ids
from clover_vllm.base.show import print_table
from clover_vllm.bench import report
from clover_vllm.bench.loop import Contender, Load, Request, count_runs, run_loads, sweep
from clover_vllm.bench.methods import Method, select
from clover_vllm.bench.prompts import PROMPT_SETS, prompt_set
from clover_vllm.bench.settings import LENGTHS, BenchSettings, longest_answer
from clover_vllm.bench.through_llm import BenchEngine
from clover_vllm.bench.through_server import BenchServer
from clover_vllm.bench.worker import TURN
from clover_vllm.launch.environment import is_cpu_build, prepare
from clover_vllm.target.make import make_target

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 32
"""Longest answers of requests that are not measured, on average."""

DEVELOPMENT = 8
"""One distinct prompt in this many is for choosing settings, never for figures."""

Prompts = list[list[int]]
"""Token ids."""


def bench(settings: BenchSettings) -> None:
    """Measure, print tables, write JSON and plots.

    Raises:
        UserError: anything that the user can mend.
    """
    settings.check()
    grids = select(settings.methods, settings.head, settings.eagle_head)
    target = settings.target or str(make_target("smollm2-135m"))
    source = prompt_file(settings.prompts)
    figures, development = _prompts(settings, source, target)
    loads = _loads(settings, figures, settings.repetitions)
    llm = engine_settings(settings, target)

    def start(method: Method) -> AbstractContextManager[Contender]:
        return BenchServer(method, llm) if settings.server else BenchEngine(method, llm)

    prepare()
    chosen = {load.concurrency: [grid[0] for grid in grids] for load in loads}
    swept = [c for c in settings.concurrency if settings.sweep and keeps(development, c)]
    if swept:
        trials = _loads(replace(settings, concurrency=swept), development, 1)
        with Work("runs", sum(count_runs(trials, lambda _, g=g: g) for g in grids if len(g) > 1)) as work:  # type: ignore[misc]
            found = sweep(start, trials, grids, work)
        chosen = {c: found[nearest(swept, c)] for c in settings.concurrency}
    with Work("runs", count_runs(loads, chosen.__getitem__)) as work:
        comparison = report.Comparison(run_loads(start, loads, chosen.__getitem__, work))
    if comparison.silent:
        logger.warning("%s", comparison.left_out())
    print_table(report.table(comparison))
    if not settings.server:
        print_table(report.split_table(comparison))
    if settings.output is None:
        return
    header = {
        "through": "vllm serve and vllm bench serve" if settings.server else "LLM",
        # Servers, and engines under async scheduling, run without a pause.
        "turn_seconds": None if settings.server or not is_cpu_build() else TURN,
        "methods": {
            f"{m.name}, {m.settings}" if m.settings else m.name: _public(m.speculative)
            for methods in chosen.values()
            for m in methods
        },
        "swept": swept,
        "engine": _public(llm),
        "prompts": {
            "file": source.name,
            "distinct": len(figures),
            "per_run": {load.concurrency: len(load.runs[0]) for load in loads},
            "development": len(development) if swept else 0,
        },
        "max_tokens": settings.max_tokens,
        "longest_answers": span_of(request for load in loads for run in load.runs for request in run),
        "temperature": settings.temperature,
        "left_out": comparison.silent,
    }
    print(f"Written: {report.write(comparison, settings.output, header)}, and plots beside it.")


def prompt_file(name: str | None) -> Path:
    """A shipped set of prompts by its name, or a file of the user's; without a name what was held out.

    Raises:
        UserError: there is neither.
    """
    if name is None:
        return shipped_head() / "held-out.jsonl.gz"
    if name in PROMPT_SETS:
        return prompt_set(name)
    if not Path(name).is_file():
        raise UserError(f"--prompts is {name!r}, which is no file and none of {', '.join(PROMPT_SETS)}.")
    return Path(name)


def engine_settings(settings: BenchSettings, target: str) -> dict[str, Any]:
    """Arguments of vllm.LLM, the same for all methods."""
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
    return llm


def _prompts(settings: BenchSettings, source: Path, target: str) -> tuple[Prompts, Prompts]:
    """Prompts for figures and for development.

    Raises:
        UserError: too few to keep the concurrency.
    """
    widest = max(settings.concurrency)
    wanted = widest + settings.repetitions * sum(map(settings.per_run, settings.concurrency))
    room = settings.max_model_len - longest_answer(settings.max_tokens, LENGTHS[1])
    count = -(-wanted * DEVELOPMENT // (DEVELOPMENT - 1))
    if settings.sweep:  # the development split keeps the concurrency too, if there are so many
        count = max(count, 2 * widest * DEVELOPMENT)
    found = fitting_prompts(source, count, room, target)
    figures, development = split_prompts(found)
    checked = [(figures, widest, "to measure")]
    checked += [(development, min(settings.concurrency), "to sweep")] if settings.sweep else []
    for prompts, concurrency, use in checked:
        if not keeps(prompts, concurrency):
            raise UserError(
                f"{source} holds {len(prompts)} distinct prompts {use} with; --concurrency {concurrency} needs "
                f"{2 * concurrency}."
            )
    runs = settings.repetitions * len(settings.concurrency)
    if settings.server and wanted - widest > len(figures):  # engines of our own forget between runs
        logger.warning(
            "%s runs repeat the %s prompts of %s: methods that remember earlier answers (suffix) gain from that.",
            runs,
            len(figures),
            source.name,
        )
    return figures, development


def nearest(swept: Sequence[int], concurrency: int) -> int:
    """Whose settings a load takes: its own, or those of the nearest that the development split keeps."""
    return min(swept, key=lambda other: abs(other - concurrency))


def keeps(prompts: Prompts, concurrency: int) -> bool:
    """Whether there are prompts enough to keep so many requests running while the clock runs."""
    return len(prompts) >= 2 * concurrency


def split_prompts(prompts: Prompts) -> tuple[Prompts, Prompts]:
    """Distinct prompts for figures, and every `DEVELOPMENT`-th of them for choosing settings."""
    distinct = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
    figures = [ids for i, ids in enumerate(distinct) if (i + 1) % DEVELOPMENT]
    return figures, distinct[DEVELOPMENT - 1 :: DEVELOPMENT]


def _loads(settings: BenchSettings, prompts: Prompts, repetitions: int) -> list[Load]:
    sizes = [settings.per_run(c) for c in settings.concurrency for _ in range(repetitions)]
    portions, spare = share_out(prompts, sizes)
    remaining = iter(portions)
    loads = []
    for concurrency in settings.concurrency:
        # Twice the concurrency: a batch of that size both starts and is topped up.
        warm_up = [spare[i % len(spare)] for i in range(2 * concurrency)]
        runs = [
            requests_of(next(remaining), settings.max_tokens, settings.temperature, seed=repetition)
            for repetition in range(repetitions)
        ]
        loads.append(
            Load(
                concurrency,
                requests_of(warm_up, min(WARM_UP_TOKENS, settings.max_tokens), settings.temperature),
                runs,
            )
        )
    return loads


def share_out(prompts: Prompts, sizes: Sequence[int]) -> tuple[list[Prompts], Prompts]:
    """Prompts for each run, and those to warm engines up with.

    No prompt is asked twice while there are enough: suffix decoding drafts from earlier answers, and would
    be measured at repeating them. Where there are too few they go round.

    Args:
        prompts: one or more.
        sizes: prompts wanted per run; with fewer than that, a run asks all of them once.
    """
    portions, first = [], 0
    for size in (min(size, len(prompts)) for size in sizes):
        portions.append([prompts[i % len(prompts)] for i in range(first, first + size)])
        first += size
    return portions, prompts[first:] or prompts


def requests_of(prompts: Prompts, max_tokens: int, temperature: float, seed: int = 0) -> list[Request]:
    """Requests whose longest answers are evenly spread over `LENGTHS`, in any order.

    Args:
        prompts: one per request.
        max_tokens: mean of those lengths.
        temperature: 0 is greedy; else every request has a seed.
        seed: of the order.
    """
    low, high = LENGTHS
    count = len(prompts)
    shares = [low + (high - low) * (i + 0.5) / count for i in range(count)]
    random.Random(seed).shuffle(shares)
    return [
        {
            "prompt": prompt,
            "params": {"temperature": temperature, "max_tokens": longest_answer(max_tokens, share)}
            | ({"seed": i} if temperature else {}),
        }
        for i, (prompt, share) in enumerate(zip(prompts, shares, strict=True))
    ]


def span_of(requests: Iterable[Request]) -> list[int]:
    """The shortest and the longest of their longest answers, tokens."""
    lengths = [request["params"]["max_tokens"] for request in requests]
    return [min(lengths), max(lengths)]


def fitting_prompts(path: Path, count: int, longest: int, target: str) -> Prompts:
    """Token ids of the first prompts that fit.

    Args:
        path: as `base.prompts` reads it, with token ids too.
        count: most prompts.
        longest: prompts with more tokens are passed over.
        target: whose tokenizer and chat template read text.

    Raises:
        UserError: the file cannot be read, or no prompt fits.
    """
    tokenizer: Any = None
    found: Prompts = []
    for prompt in each_prompt([path], allow_ids=True):
        if len(found) == count:
            break
        if prompt.ids is None and tokenizer is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(target)
        ids = token_ids(prompt, tokenizer)
        if len(ids) <= longest:
            found.append(ids)
    if not found:
        raise UserError(f"{path} holds no prompt of at most {longest} tokens.")
    return found


def _public(settings: dict[str, Any] | None) -> dict[str, Any] | None:
    """Settings with the names of local folders alone."""
    if settings is None:
        return None
    return {k: Path(v).name if k == "model" else v for k, v in settings.items()}
