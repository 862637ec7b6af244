"""Whether trees on vLLM's V2 runner say what plain V2 says, on a GPU: eager and with CUDA graphs, in float32 and bfloat16.

The target is tiny and random. Most trees are scripted, so that nodes are accepted in trees that branch; one job is left
to an untrained head. In float32 nothing may differ. In bfloat16, greedy answers may part where plain decoding itself has
two tokens whose logprobs are within NEAR_TIE, since rows of another batch are rounded in another way.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clover_vllm.bench.gpu.cases import Json, Machine, Report, run_case
from clover_vllm.check.features import FEATURES, KINDS, in_both_kinds, in_one_kind
from clover_vllm.check.tiny import make_tiny_pair
from clover_vllm.check.torture import difference
from clover_vllm.launch.in_process import core_of, runner_of

NEAR_TIE = 0.25
"""Logprobs: logits of about 16 are a sixteenth apart in bfloat16, and layers add up."""

AT_ONCE = 4
"""Engines on a GPU at a time; they are tiny."""

SECONDS = 200.0
"""Most of an engine: 45 to start, another 60 where Triton's cache lacks vLLM's samplers, and trees wait for plain vLLM."""

NO_GRAMMAR = ("structured", "structural", "thinking")
"""Features that need packages besides vLLM's own code, and one that needs a reasoning parser."""


@dataclass(frozen=True)
class EngineCase:
    """An engine with trees, compared with plain vLLM of the same attention and dtype, run eagerly."""

    backend: str  # of attention
    dtype: str
    mode: str  # eager, graphs (of whole decode steps, without torch.compile) or default (vLLM's own)

    def __str__(self) -> str:
        return f"{self.backend} {self.dtype} {self.mode}"


CASES = (
    EngineCase("TRITON_ATTN", "float32", "eager"),
    EngineCase("TRITON_ATTN", "float32", "graphs"),
    EngineCase("TRITON_ATTN", "bfloat16", "graphs"),
    EngineCase("FLASH_ATTN", "bfloat16", "graphs"),
    EngineCase("TRITON_ATTN", "bfloat16", "eager"),
    EngineCase("TRITON_ATTN", "float32", "default"),
)


@dataclass(frozen=True)
class EngineSizes:
    """Of engines and requests."""

    nodes: int
    longest: int  # tokens of an answer
    copies: int  # of each feature and kind of sampling; 0: every other feature once
    requests: int  # that run at a time
    block: int
    blocks: int  # few enough that requests are preempted


ON_GPU = EngineSizes(nodes=16, longest=40, copies=2, requests=16, block=16, blocks=60)
QUICK = EngineSizes(nodes=16, longest=24, copies=1, requests=16, block=16, blocks=52)
INTERPRETED = EngineSizes(nodes=7, longest=7, copies=0, requests=6, block=32, blocks=9)


def check_exactness(output: Path, machine: Machine) -> bool:
    """Run all cases and write what is found into `gpu-exactness.json` of a folder.

    Returns:
        whether all is as it should be.
    """
    sizes = INTERPRETED if machine.interpret else QUICK if machine.quick else ON_GPU
    cases: Sequence[EngineCase] = CASES[:1] if machine.interpret else CASES[:4] if machine.quick else CASES
    report = Report(output / "gpu-exactness.json", {"sizes": vars(sizes), "near tie": NEAR_TIE})
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(AT_ONCE) as pool:
        folder = Path(made)
        if not machine.interpret:
            missing = run_case(find_flash, {}, machine, 60)
            if missing.get("problem") or "error" in missing:
                report.add("FLASH_ATTN", {"ok": True, "left out": missing})
                cases = tuple(case for case in cases if case.backend != "FLASH_ATTN")
        target, head = make_tiny_pair(folder, kv_heads=1)
        jobs = {
            "features": {"requests": feature_requests(sizes), "scripted": 0.8},
            "head": {"requests": short_requests(sizes), "scripted": 0.0},
        }
        plain = {}
        for backend, dtype in dict.fromkeys((case.backend, case.dtype) for case in cases):
            spec = specification(EngineCase(backend, dtype, "eager"), sizes, target, None, jobs, machine)
            spec["keep"] = str(folder / f"{backend}-{dtype}.json")
            plain[backend, dtype] = spec
        waiting = {
            f"{key[0]} {key[1]}": pool.submit(run_reference, spec, machine) for key, spec in plain.items()
        }
        judged = []
        for case in cases:
            spec = specification(case, sizes, target, head, jobs, machine)
            spec["known"] = plain[case.backend, case.dtype]["keep"]
            spec["keep"] = str(folder / f"{case}.json".replace(" ", "-"))
            run = pool.submit(run_case, run_engine, spec, machine, SECONDS)
            judged.append((case, spec, run))
        for name, reference in waiting.items():
            found = reference.result()
            if "error" in found:
                report.add(f"plain {name}", found)
        for case, spec, run in judged:
            report.add(str(case), judge(case, run.result(), Path(spec["known"]), Path(spec["keep"]), jobs))
    return report.ok


def run_reference(spec: Json, machine: Machine) -> Json:
    """Plain vLLM's answers; where it fails, those who wait for them are told so."""
    found = run_case(run_engine, spec, machine, SECONDS)
    keep = Path(spec["keep"])
    if not keep.exists():
        keep.write_text("null")
    return found


def specification(
    case: EngineCase, sizes: EngineSizes, target: Path, head: Path | None, jobs: Json, machine: Machine
) -> Json:
    """What `run_engine` is to do; no head: plain vLLM."""
    rows = sizes.nodes + 1 if head else 1
    llm: Json = {
        "model": str(target),
        "dtype": case.dtype,
        "max_model_len": 128 if machine.interpret else 256,
        "max_num_seqs": sizes.requests,
        "max_num_batched_tokens": 64 if machine.interpret else 20 * sizes.requests,
        "block_size": sizes.block,
        "num_gpu_blocks_override": sizes.blocks,
        "kv_cache_memory_bytes": 1 << 24 if machine.interpret else 1 << 28,
        "disable_log_stats": True,
        "logprobs_mode": "raw_logprobs" if case.dtype == "float32" else "processed_logprobs",
    }
    if case.mode == "eager":
        llm["enforce_eager"] = True
    else:
        counts = [1, 4, sizes.requests // 2, sizes.requests]  # batches between them are padded
        llm["compilation_config"] = {"cudagraph_capture_sizes": [rows * count for count in counts]}
        if case.mode == "graphs":
            llm["compilation_config"] |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if not machine.interpret:
        llm |= {"attention_backend": case.backend, "gpu_memory_utilization": 0.1}
    if head:
        llm["speculative_config"] = {
            "method": "clover2",
            "model": str(head),
            "num_speculative_tokens": sizes.nodes,
            "tree": "best_first",
            "draft_rounds": 3,
        }
    # vLLM's Triton attention multiplies float32 as tf32 otherwise, and our kernel does not.
    environment = {"TRITON_F32_DEFAULT": "ieee"} if case.dtype == "float32" else {}
    return {"llm": llm, "jobs": jobs, "environment": environment}


def feature_requests(sizes: EngineSizes) -> list[Json]:
    """Each feature, with prompts that share their beginnings; some requests are aborted."""
    rng = random.Random(2)
    shared = [rng.randrange(3, 256) for _ in range(65)]
    features = [feature for feature in FEATURES if not feature.startswith(NO_GRAMMAR)]
    cases = in_both_kinds(features) * sizes.copies or in_one_kind(features[::2])
    requests: list[Json] = []
    for i, (feature, kind) in enumerate(cases + [("none", "greedy"), ("none", "seeded")] * 3):
        own = [rng.randrange(3, 256) for _ in range(rng.randrange(2, 20))]
        longest = sizes.longest if i % 8 or sizes.copies == 0 else 3 * sizes.longest
        params = {"max_tokens": longest, "ignore_eos": True, **KINDS[kind], **FEATURES[feature]}
        if kind == "greedy":
            params.setdefault("logprobs", 5)
        else:
            params["seed"] = i
        params["min_tokens"] = min(params.get("min_tokens", 0), longest // 2)
        params["stop_token_ids"] = params.get("stop_token_ids", [])[
            :100
        ]  # V2 takes up to 128 with min_tokens
        prompt = shared[: rng.choice([0, 20, 33, 65])] + own
        requests.append({"prompt": prompt, "params": params, "step": i // 3})
    for request in requests[5::12]:
        request["abort"] = request["step"] + 4
    return requests


def short_requests(sizes: EngineSizes) -> list[Json]:
    """For the untrained head."""
    return [
        {"prompt": [3 + i, 20, 44], "params": {"max_tokens": sizes.longest, "ignore_eos": True, **kind}}
        for i, kind in enumerate([*KINDS.values(), *KINDS.values()])
    ]


def find_flash(_: Json, say: Callable[..., None]) -> None:
    """In a process of its own: whether vLLM's FlashAttention can be used."""
    from clover_vllm.bench.gpu.flash import flash_attention_problem

    say(problem=flash_attention_problem())


def run_engine(spec: Json, say: Callable[..., None]) -> None:
    """In a process of its own: one engine answers all jobs.

    Args:
        spec: see `specification`; "keep" names the file that answers are written to, "known" that of plain vLLM's.
        say: keeps statistics.
    """
    from vllm import LLM

    from clover_vllm.check.scripted import ScriptedSlots, drive

    started = time.monotonic()
    llm = LLM(**spec["llm"])
    runner = runner_of(llm)
    say(
        **{
            "start seconds": round(time.monotonic() - started, 1),
            "runner": f"{type(runner).__module__}.{type(runner).__name__}",
            "scheduler": type(core_of(llm).scheduler).__name__,
            "attention": sorted({type(layer.impl).__name__ for layer in _attention_layers(runner)}),
        }
    )
    seen = script = None
    known: Json = {}
    if "known" in spec:
        seen = Seen(runner)
        script = ScriptedSlots(runner, seed=1, share=0.0)
        known = _wait_for(Path(spec["known"]))
    results: Json = {}
    for name, job in spec["jobs"].items():
        if script is not None:
            script.share = job["scripted"]
            script.know([[sequence["tokens"] for sequence in outputs] for outputs in known[name]["outputs"]])
        result = drive(llm, job["requests"])
        if seen is not None:
            result["stats"] |= seen.take()
        results[name] = result
        say(**{name: result["stats"]})
    fresh = Path(spec["keep"]).with_suffix(".tmp")
    fresh.write_text(json.dumps(results))
    fresh.rename(spec["keep"])


def _attention_layers(runner: Any) -> list[Any]:
    layers = runner.compilation_config.static_forward_context.values()
    return [layer for layer in layers if hasattr(layer, "impl")]


def _wait_for(file: Path) -> Json:
    """Plain vLLM's answers.

    Raises:
        RuntimeError: there are none.
    """
    while not file.exists():
        time.sleep(0.1)
    found: Json | None = json.loads(file.read_text())
    if found is None:
        raise RuntimeError("plain vLLM failed")
    return found


def judge(case: EngineCase, found: Json, known: Path, answers: Path, jobs: Json) -> Json:
    """Add to an engine's statistics how its answers differ from plain vLLM's, and whether that is as it should be."""
    if not (known.exists() and answers.exists()):
        return {"error": "there are no answers to compare", **found}
    plain, trees = json.loads(known.read_text()), json.loads(answers.read_text())
    exact = case.dtype == "float32"
    for name, job in jobs.items():
        counts = count_differences(plain[name]["outputs"], trees[name]["outputs"], job["requests"], exact)
        found[name] = {**found[name], **counts}
    features = found["features"]
    found["problems"] = [
        *(
            f"{name}: answers differ"
            for name in jobs
            if found[name]["not near ties" if not exact else "differ"]
        ),
        *(f"{name}: blocks were lost" for name in jobs if found[name]["leaked_blocks"]),
        *(
            f"features: {wanted} is 0"
            for wanted in ("accepted_in_branching", "moved", "mixed_steps", "preempted", "cached_tokens")
            if not features.get(wanted)
        ),
    ]
    found["ok"] = not found["problems"] and "error" not in found
    return found


def count_differences(plain: list[Any], trees: list[Any], requests: list[Json], exact: bool) -> Json:
    """Of requests that were not aborted: tokens, those that differ, and the first differences.

    Args:
        plain, trees: outputs of `drive`.
        requests: what was asked for.
        exact: texts, ends and logprobs must be equal too.
    """
    counts: Counter[str] = Counter(requests=0, tokens=0, differ=0)
    counts["tokens that differ"] = counts["not near ties"] = counts["seeded that differ"] = 0
    firsts = []
    for i, request in enumerate(requests):
        if "abort" in request:
            continue
        counts["requests"] += 1
        counts["tokens"] += sum(len(one["tokens"]) for one in plain[i])
        said = difference(plain[i], trees[i])
        if said is None or (
            not exact and all(a["tokens"] == b["tokens"] for a, b in zip(plain[i], trees[i], strict=True))
        ):
            continue
        counts["differ"] += 1
        for one, other in zip(plain[i], trees[i], strict=False):
            counts["tokens that differ"] += sum(
                a != b for a, b in zip(one["tokens"], other["tokens"], strict=False)
            ) + abs(len(one["tokens"]) - len(other["tokens"]))
        greedy = request["params"].get("temperature", 1.0) == 0.0
        gap = tie_gap(plain[i][0], trees[i][0]) if greedy else None
        counts["seeded that differ"] += not greedy
        counts["not near ties"] += greedy and not (gap is not None and gap <= NEAR_TIE)
        firsts.append({"request": i, "params": request["params"], "difference": said, "logprob gap": gap})
    return {**counts, "first differences": firsts[:20]}


def tie_gap(plain: Json, trees: Json) -> float | None:
    """By how much plain vLLM preferred its own token at the first difference; None where it did not list the other."""
    for at, (a, b) in enumerate(zip(plain["tokens"], trees["tokens"], strict=False)):
        if a != b:
            listed = {token: logprob for token, logprob, _ in (plain["logprobs"] or [[]] * (at + 1))[at]}
            return listed[a] - listed[b] if a in listed and b in listed else None
    return None


class Seen:
    """Counts what a V2 runner verifies. It reads the device, so nothing may be timed beside it."""

    def __init__(self, runner: Any) -> None:
        self.counts: Counter[str] = Counter()
        self._sample, self._runner = runner.sample, runner
        runner.sample = self.sample

    def sample(self, hidden: Any, batch: Any, grammar: Any) -> Any:
        """In the place of the runner's."""
        trees, slots = self._runner.trees.kept, batch.idx_mapping
        tokens, parents = trees.tokens[slots].clone(), trees.parents[slots].clone()
        made = self._sample(hidden, batch, grammar)
        self.counts["steps"] += 1
        if batch.num_draft_tokens == 0:
            return made
        self.counts["mixed_steps"] += bool(batch.has_prefill)
        paths = self._runner.speculator.scored.path.tolist()
        drafts = batch.num_draft_tokens_per_req.tolist()
        for path, count, own, above, given in zip(
            paths, made[1].tolist(), tokens.tolist(), parents.tolist(), drafts, strict=True
        ):
            nodes = sum(token >= 0 for token in own[:given])
            self.counts["drafts"] += nodes
            if count > 1:
                self.counts["accepted"] += count - 1
                branching = any(parent != i - 1 for i, parent in enumerate(above[:nodes]))
                self.counts["accepted_in_branching"] += branching
                self.counts["moved"] += any(row != depth + 1 for depth, row in enumerate(path[: count - 1]))
        return made

    def take(self) -> Json:
        """Counts since the last call."""
        found, self.counts = dict(self.counts), Counter()
        return found
