"""`clover-vllm torture`: random requests through random engines, each compared with plain vLLM.

One plain engine with ample settings answers every request. Engines with Clover-2 and random settings (a
tiny cache, a tiny token budget, a small max_model_len, any tree) get the same requests, arriving over time,
some of them twice, some aborted. Every request that finishes must be the same to the last token, and
every cache block must come back. The target is tiny and random, in float32, so that thousands of requests
take minutes. Half of the trees hide the right answer, so that nodes are accepted.

With `--interpreter` both are on vLLM's V2 model runner and its Triton kernels are interpreted, which takes seconds per
request; so engines are smaller and answers shorter.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clover_vllm.base.errors import UserError
from clover_vllm.base.progress import Work
from clover_vllm.base.provenance import write_result
from clover_vllm.base.show import print_table
from clover_vllm.check.settings import TortureSettings
from clover_vllm.check.tiny import VOCAB, make_tiny_pair
from clover_vllm.launch.environment import prepare
from clover_vllm.launch.process import JsonProcess

Json = dict[str, Any]

LONGEST = 384
"""Longest max_model_len of a tortured engine, tokens."""

LONGEST_INTERPRETED = 24
"""Longest answer in Triton's interpreter, tokens."""

LOGPROB_ERROR = 1e-3
"""Largest difference of a logprob that counts as equal (float32, other batches)."""


TIE_ATTEMPTS = 12

WARM_UP_REQUESTS = 10_000
"""Memory of plain vLLM grows until about this request, too."""

JUDGED_REQUESTS = 20_000
"""Engines that served this many are judged: their memory must not grow by more than MOST_GROWTH after the warm-up."""

MOST_GROWTH = 0.02

MOST_TIES = 1e-4
"""Of compared requests; more would be a kernel that lost precision."""


@dataclass
class TortureOutcome:
    """What was seen (filled by `torture`)."""

    requests: int = 0
    compared: int = 0
    tokens: int = 0
    differences: list[str] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)  # set aside; see `is_tie`
    leaked_blocks: int = 0
    engines: int = 0
    preempted: int = 0
    cached_tokens: int = 0
    drafts: float = 0.0
    accepted: float = 0.0
    slept: int = 0  # steps in which adaptive trees slept at random
    verified: dict[str, float] = field(default_factory=dict)  # nodes of adaptive trees, by source
    kept: dict[str, float] = field(default_factory=dict)  # of those, the accepted ones
    seconds: float = 0.0
    # Resident memory after each wave, less malloc's free pages, per engine: (minutes since the start, MiB), and
    # after how many requests of that engine. Plain vLLM's is for comparison.
    memory: list[list[tuple[float, float]]] = field(default_factory=list)
    served: list[list[int]] = field(default_factory=list)
    plain_memory: list[tuple[float, float]] = field(default_factory=list)
    plain_served: list[int] = field(default_factory=list)
    failure: str | None = None

    @property
    def clean(self) -> bool:
        """Whether nothing differs or leaks, and memory and ties stay within bounds."""
        grown = self.memory_growth
        return (
            not self.differences
            and not self.leaked_blocks
            and (grown is None or grown <= MOST_GROWTH)
            and len(self.ties) <= 1 + MOST_TIES * self.compared
        )

    @property
    def memory_growth(self) -> float | None:
        """By which share the memory of an engine grew behind its warm-up, the worst; None: none ran so long."""
        grown = [_growth(memory, served) for memory, served in zip(self.memory, self.served, strict=True)]
        return max((g for g in grown if g is not None), default=None)


class Engine(JsonProcess):
    """A `torture_worker` process."""

    def __init__(
        self, name: str, llm: Json, script: int | None, core: int | None, interpret: bool = False
    ) -> None:
        """
        Args:
            name: for messages.
            llm: arguments of vllm.LLM.
            script: seed of scripted trees, or None.
            core: processor core to bind to, or None.
            interpret: see `TortureSettings.interpreter`.
        """
        environment = {} if core is None else {"VLLM_CPU_OMP_THREADS_BIND": str(core)}
        super().__init__("clover_vllm.check.torture_worker", name, environment)
        self.tell({"llm": llm, "script": script, "interpret": interpret})

    def run(self, requests: list[Json], known: list[Any], noise: int | None = None) -> Json:
        """A wave; see `torture_worker`.

        Raises:
            UserError: the engine ended.
        """
        return self.ask({"requests": requests, "known": known, "noise": noise})


def random_engine(rng: random.Random, interpret: bool = False) -> Json:
    """Random arguments of vllm.LLM with Clover-2, the model left out.

    Args:
        rng: where the randomness comes from.
        interpret: smaller ones, for Triton's interpreter.
    """
    nodes = rng.choice([1, 2, 3, 5, 8, 8, 12, 16])
    max_model_len = rng.choice([64, 96, 160] if interpret else [64, 96, 160, 256, LONGEST])
    block = rng.choice([32, 64] if interpret else [32, 64, 128])
    max_num_seqs = rng.choice([2, 4, 6] if interpret else [1, 2, 4, 8, 16])
    one = -(-(max_model_len + nodes + 2) // block)  # blocks that the longest request needs
    tree: Any = rng.choice(
        ["adaptive"] * 4 + ["best_first"] * 3 + ["chain", "published", [[0], [1], [0, 0], [1, 0], [0, 0, 0]]]
    )
    return {
        "max_model_len": max_model_len,
        "block_size": block,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(max_num_seqs + 1, rng.choice([20, 40, 64, 200, 512])),
        "num_gpu_blocks_override": one + 2 + rng.randrange(1 + 2 * one),
        "enable_prefix_caching": rng.random() < 0.7,
        "scheduling_policy": rng.choice(["fcfs", "priority"]),
        "speculative_config": {
            "method": "clover2",
            "num_speculative_tokens": nodes,
            "tree": tree,
            "draft_min_joint": rng.choice([0.0, 0.0, 0.05, 0.3]),
            "draft_min_share": rng.choice([0.0, 0.0, 0.25]),
            "retrieval": rng.choice(["all", "all", "own", "off"]),
            "backlog_mib": rng.choice([1, 64]),
        },
    }


def random_params(rng: random.Random, longest: int) -> Json:
    """Random sampling parameters; whatever samples has a seed.

    Args:
        rng: where the randomness comes from.
        longest: most output tokens.
    """
    params: Json = {"max_tokens": min(longest, rng.choice([1, 2, 8, 20, 40, 80, 10_000]))}
    may = rng.random

    def some(probability: float, **values: Any) -> None:
        if may() < probability:
            params.update(values)

    params["ignore_eos"] = may() < 0.5
    if may() < 0.5:
        params.update(temperature=rng.uniform(0.2, 1.5), seed=rng.randrange(2**31))
        some(0.3, top_p=rng.uniform(0.3, 0.99))
        some(0.3, top_k=rng.randrange(1, 50))
        some(0.3, min_p=rng.uniform(0.01, 0.4))
        some(0.15, n=rng.randrange(2, 4))
    else:
        params["temperature"] = 0.0
    some(0.15, presence_penalty=rng.uniform(-1, 2))
    some(0.15, frequency_penalty=rng.uniform(-1, 2))
    some(0.15, repetition_penalty=rng.uniform(0.8, 1.6))
    some(0.15, logit_bias={str(rng.randrange(VOCAB)): rng.uniform(-20, 8) for _ in range(3)})
    some(0.1, bad_words=rng.sample(["a", "e", "th", "cat", "B", " the", "7"], 3))
    some(0.15, stop=rng.sample(["a", "e", "Q", "th", "x", "7"], 2), include_stop_str_in_output=may() < 0.5)
    some(0.15, stop_token_ids=rng.sample(range(3, VOCAB), 12))
    some(0.15, min_tokens=rng.randrange(0, params["max_tokens"] + 1))
    some(
        0.1,
        repetition_detection={"max_pattern_size": rng.randrange(1, 5), "min_count": rng.randrange(2, 4)},
    )
    some(0.2, logprobs=rng.choice([0, 1, 5]))
    some(0.05, prompt_logprobs=rng.choice([0, 2]))
    kind = rng.randrange(24)
    if kind == 0:
        params["allowed_token_ids"] = sorted(rng.sample(range(3, VOCAB), 60))
    elif kind < 4:
        params["structured_outputs"] = (
            {"json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
            {"regex": r"[a-f]{4}-\d{3,9}(x|yz)*"},
            {"choice": ["positive", "negative", "neither of them"]},
        )[kind - 1]
        params.pop("bad_words", None)
        params.pop("min_tokens", None)
        params["ignore_eos"] = False
    return params


def random_wave(rng: random.Random, count: int, max_model_len: int, prompts: list[list[int]]) -> list[Json]:
    """Requests that arrive over time; `prompts` remembers theirs, for later repetitions and extensions."""
    wave = []
    for _ in range(count):
        longest = max_model_len - 1
        prompt = [rng.randrange(3, VOCAB) for _ in range(min(longest, rng.choice([1, 3, 10, 40, 90, 200])))]
        if prompts and rng.random() < 0.3:
            prompt = (rng.choice(prompts) + prompt[: rng.choice([0, 1, 20])])[:longest]
        prompts.append(prompt)
        request: Json = {
            "prompt": prompt,
            "params": random_params(rng, max_model_len - len(prompt)),
            "step": rng.randrange(2 * count),
            "priority": rng.randrange(3),
        }
        if rng.random() < 0.08:
            request["abort"] = request["step"] + rng.randrange(30)
        wave.append(request)
    return wave


def shortened(wave: list[Json], longest: int) -> list[Json]:
    """The same requests, with answers of at most `longest` tokens."""
    for request in wave:
        params = request["params"]
        params["max_tokens"] = min(params["max_tokens"], longest)
        if "min_tokens" in params:
            params["min_tokens"] = min(params["min_tokens"], params["max_tokens"])
    return wave


def difference(plain: list[Json], trees: list[Json]) -> str | None:
    """What differs between a request's sequences, or None.

    Args:
        plain, trees: sequences as `drive` returns them.
    """
    if len(plain) != len(trees):
        return f"{len(plain)} sequences against {len(trees)}"
    for one, other in zip(plain, trees, strict=True):
        if one["tokens"] != other["tokens"]:
            pairs = enumerate(zip(one["tokens"], other["tokens"], strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(one["tokens"]), len(other["tokens"])))
            return f"token {at} of {len(one['tokens'])} against {len(other['tokens'])} tokens"
        for key in ("text", "finish", "stop"):
            if one[key] != other[key]:
                return f"{key} {one[key]!r} against {other[key]!r}"
        for key in ("logprobs", "prompt_logprobs"):
            wrong = _logprob_difference(one[key], other[key])
            if wrong is not None:
                return f"{key}: {wrong}"
    return None


def is_tie(plain: list[Json], trees: list[Json], ask_again: Callable[[int], list[Json]]) -> bool:
    """Whether plain vLLM itself says what was said with trees once its logits move by float32 noise.

    Among a million tokens a few are drawn, or cut by top-p, between two that tie to within 1e-5; which of them it
    is depends on the rows that share a step.

    Args:
        plain, trees: sequences that differ.
        ask_again: plain vLLM's for the same request, its logits moved by noise of this seed.
    """
    differing = {
        s: next(
            (i for i, (a, b) in enumerate(zip(one["tokens"], other["tokens"], strict=False)) if a != b),
            min(len(one["tokens"]), len(other["tokens"])),
        )
        for s, (one, other) in enumerate(zip(plain, trees, strict=False))
        if one["tokens"] != other["tokens"]
    }
    if len(plain) != len(trees) or not differing:
        return False
    for seed in range(TIE_ATTEMPTS):
        moved = ask_again(seed)
        differing = {
            s: at
            for s, at in differing.items()
            if moved[s]["tokens"][: at + 1] != trees[s]["tokens"][: at + 1]
        }
        if not differing:
            return True
    return False


Position = list[tuple[int, float, int]]


def _logprob_difference(plain: list[Position] | None, trees: list[Position] | None) -> str | None:
    """What differs between (token, logprob, rank) of positions, the sampled or prompt token first."""
    if plain is None or trees is None:
        return None if plain is trees else "missing"
    if len(plain) != len(trees):
        return f"{len(plain)} positions against {len(trees)}"
    for position, again in zip(plain, trees, strict=True):
        if _undefined(position) and _undefined(again) and position[0][0] == again[0][0]:
            continue  # no token is allowed; plain vLLM's candidates depend on the batch then
        same = len(position) == len(again)
        # Values may not move; behind the first, candidates of nearly equal logits may swap places.
        same = same and all(
            p == q or abs(p - q) <= LOGPROB_ERROR or (p != p and q != q)
            for (_, p, _), (_, q, _) in zip(position, again, strict=True)
        )
        same = same and [entry[0] for entry in position[:1]] == [entry[0] for entry in again[:1]]
        if not same:
            return f"{position} against {again}"
    return None


def _undefined(position: Position) -> bool:
    return bool(position) and math.isnan(position[0][1])


def torture(settings: TortureSettings) -> TortureOutcome:
    """Run, show progress and a table, and write the result.

    Raises:
        UserError: something differs, a block is lost, or an engine ends; the sentence reproduces it.
    """
    prepare()
    outcome = TortureOutcome()
    cores = sorted(os.sched_getaffinity(0))
    until = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        Work("requests", settings.requests if until is None else None) as work,
    ):
        interpret = settings.interpreter
        target, head = make_tiny_pair(Path(folder), kv_heads=1 if interpret else 2)
        same = {"model": str(target), "dtype": "float32", "enforce_eager": True, "disable_log_stats": True}
        ample = {"max_model_len": 512, "max_num_seqs": 16, "max_num_batched_tokens": 8192}
        if interpret:
            same["kv_cache_memory_bytes"] = 1 << 24
            ample = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 512}
        plain = Engine("plain vLLM", {**same, **ample}, None, cores[-1], interpret)
        pool = ThreadPoolExecutor(1)
        try:
            plain.hear()
            seed = settings.seed
            while outcome.requests < settings.requests if until is None else time.monotonic() < until:
                rng = random.Random(seed)
                llm = random_engine(rng, interpret)
                llm["speculative_config"]["model"] = str(head)
                trees = Engine("Clover-2", {**same, **llm}, seed, cores[0], interpret)
                try:
                    _one_engine(settings, seed, rng, llm, plain, trees, pool, outcome, started, until, work)
                finally:
                    trees.close()
                outcome.engines += 1
                seed += 1
        except UserError as error:
            outcome.failure = str(error)
        finally:
            pool.shutdown()
            plain.close()
    outcome.seconds = time.monotonic() - started
    _show(outcome)
    if settings.output is not None:
        write(outcome, settings.output, "torture-v2.json" if settings.interpreter else "torture.json")
    if outcome.failure is not None:
        raise UserError(outcome.failure)
    if not outcome.clean:
        raise UserError(
            f"{len(outcome.differences)} requests differ from plain vLLM, {outcome.leaked_blocks} cache "
            f"blocks were lost, memory grew by {_percent(outcome.memory_growth)}; the first difference: "
            f"{(outcome.differences or ['none'])[0]}."
        )
    return outcome


def _one_engine(
    settings: TortureSettings,
    seed: int,
    rng: random.Random,
    llm: Json,
    plain: Engine,
    trees: Engine,
    pool: ThreadPoolExecutor,
    outcome: TortureOutcome,
    started: float,
    until: float | None,
    work: Work,
) -> None:
    """Waves through one engine; plain vLLM answers the next wave meanwhile."""
    count = settings.per_engine
    if until is None:
        count = min(count, settings.requests - outcome.requests)
    again = (
        f"clover-vllm torture --seed {seed} --requests {count} --per-engine {count} --wave {settings.wave}"
        f"{' --interpreter' * settings.interpreter}"
    )
    prompts: list[list[int]] = []
    sizes = [min(settings.wave, count - done) for done in range(0, count, settings.wave)]
    longest = LONGEST_INTERPRETED if settings.interpreter else LONGEST
    waves = (shortened(random_wave(rng, size, llm["max_model_len"], prompts), longest) for size in sizes)

    def answer(wave: list[Json]) -> Json:
        return plain.run([{**r, "abort": None} for r in wave], [])

    following: list[Json] | None = next(waves)
    assert following is not None
    coming = pool.submit(answer, following)
    memory: list[tuple[float, float]] = []
    served: list[int] = []
    outcome.memory.append(memory)
    outcome.served.append(served)
    try:
        trees.hear()
        for i in range(len(sizes)):
            answered, wave = coming.result(), following
            assert wave is not None
            expected = answered["outputs"]
            following = next(waves, None)
            if following is not None:
                coming = pool.submit(answer, following)
            known = [[sequence["tokens"] for sequence in sequences] for sequences in expected]
            found = trees.run(wave, known)
            stats = found["stats"]
            minutes = (time.monotonic() - started) / 60
            memory.append((minutes, stats["rss"] / 2**20))
            served.append((served[-1] if served else 0) + len(wave))
            outcome.plain_memory.append((minutes, answered["stats"]["rss"] / 2**20))
            outcome.plain_served.append((outcome.plain_served[-1] if outcome.plain_served else 0) + len(wave))
            for name in ("preempted", "cached_tokens", "leaked_blocks"):
                setattr(outcome, name, getattr(outcome, name) + stats[name])
            for j, (request, one, other) in enumerate(zip(wave, expected, found["outputs"], strict=True)):
                outcome.requests += 1
                if "abort" in request and len(other) != len(one):
                    continue  # cut short, as asked
                if "abort" in request and any(s["finish"] == "abort" for s in other):
                    continue
                outcome.compared += 1
                outcome.tokens += sum(len(s["tokens"]) for s in one)
                wrong = difference(one, other)
                if wrong is None:
                    continue

                def ask_again(noise: int, request: Json = request) -> list[Json]:
                    alone = {**request, "abort": None, "step": 0}
                    sequences: list[Json] = pool.submit(plain.run, [alone], [], noise).result()["outputs"][0]
                    return sequences

                found_in = outcome.ties if is_tie(one, other, ask_again) else outcome.differences
                found_in.append(f"{wrong} (request {j} of wave {i}; run: {again})")
            work.advance(len(wave))
            if until is not None and time.monotonic() > until:
                break
        outcome.accepted += stats["accepted"]
        outcome.drafts += stats["drafts"]
        outcome.slept += stats["slept"]
        for total, own in ((outcome.verified, stats["verified"]), (outcome.kept, stats["kept"])):
            for source, count in own.items():
                total[source] = total.get(source, 0.0) + count
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')} (run: {again}).") from None
    finally:
        coming.exception()  # the plain engine must be idle before the next one asks


def _growth(memory: list[tuple[float, float]], served: list[int]) -> float | None:
    """Memory at the end over that after the warm-up, less 1; None if the engine served too few."""
    if not served or served[-1] < JUDGED_REQUESTS:
        return None
    warm = next(i for i, count in enumerate(served) if count >= WARM_UP_REQUESTS)
    return memory[-1][1] / memory[warm][1] - 1


def by_source(verified: Mapping[str, float], kept: Mapping[str, float]) -> str:
    """`head 2 of 5, retrieved 1 of 3`"""
    parts = [f"{source} {kept[source]:,.0f} of {count:,.0f}" for source, count in verified.items()]
    return ", ".join(parts) or "none"


def _percent(share: float | None) -> str:
    return (
        f"too few requests per engine to say (under {JUDGED_REQUESTS:,})" if share is None else f"{share:.1%}"
    )


def write(outcome: TortureOutcome, output: Path, name: str = "torture.json") -> Path:
    """The result and where it comes from as JSON, with a plot of the memory beside it.

    Args:
        outcome: what was seen.
        output: the JSON file (`*.json`), or a folder.
        name: of the file in a folder.

    Returns:
        the JSON file.
    """
    growth = {
        "memory_growth": outcome.memory_growth,
        "plain_memory_growth": _growth(outcome.plain_memory, outcome.plain_served),
    }
    file = write_result(output, name, {**asdict(outcome), **growth})
    if outcome.plain_memory:
        from clover_vllm.bench.plots import plot_memory  # matplotlib comes with the training tools

        plot_memory(outcome.plain_memory, outcome.memory, file.with_suffix(".png"))
    return file


def _show(outcome: TortureOutcome) -> None:
    table = Table(title="Random requests, compared with plain vLLM", show_header=False)
    for name, value in (
        ("requests", f"{outcome.requests:,}"),
        ("compared (the others were aborted)", f"{outcome.compared:,}"),
        ("their tokens", f"{outcome.tokens:,}"),
        ("requests that differ", str(len(outcome.differences))),
        ("ties set aside, which plain vLLM breaks either way", str(len(outcome.ties))),
        ("cache blocks lost", str(outcome.leaked_blocks)),
        ("engines", str(outcome.engines)),
        ("preemptions, at least", str(outcome.preempted)),
        ("prompt tokens found in the prefix cache", f"{outcome.cached_tokens:,}"),
        ("tokens per verified draft", f"{1 + outcome.accepted / max(outcome.drafts, 1):.2f}"),
        ("steps in which adaptive trees slept", f"{outcome.slept:,}"),
        ("nodes of adaptive trees, accepted of verified", by_source(outcome.verified, outcome.kept)),
        ("memory growth after the warm-up, worst engine", _percent(outcome.memory_growth)),
        ("the same of plain vLLM", _percent(_growth(outcome.plain_memory, outcome.plain_served))),
        ("minutes", f"{outcome.seconds / 60:.1f}"),
    ):
        table.add_row(name, value)
    print_table(table)
    for line in outcome.differences[:20]:
        Console(stderr=True).print(f"differs: {line}", markup=False, soft_wrap=True)
