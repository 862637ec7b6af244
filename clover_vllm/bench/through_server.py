"""Runs of several methods through `vllm serve`, loaded by vLLM's own `vllm bench serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.progress import Progress

from clover_vllm.base.errors import UserError
from clover_vllm.bench.methods import Method
from clover_vllm.bench.report import Comparison
from clover_vllm.bench.through_llm import Result, orders
from clover_vllm.bench.worker import Run
from clover_vllm.launch.server import Server

COUNTERS = {
    "drafts": "vllm:spec_decode_num_drafts_total",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
}


def measure(
    methods: list[Method],
    llm: dict[str, Any],
    portions: list[list[list[int]]],
    warm_up: list[list[int]],
    max_tokens: int,
    temperature: float,
    concurrencies: list[int],
    repetitions: int,
    progress: Progress,
) -> Comparison:
    """One server per method; they are loaded in turn, forwards and backwards, the others stopped.

    Args:
        methods: the first is what the others are compared with.
        llm: engine settings, as arguments of vllm.LLM.
        portions: prompts of each run as token ids, repetitions of the first concurrency first.
        warm_up: prompts that are not measured.
        max_tokens: longest answer.
        temperature: of sampling.
        concurrencies: most requests at a time.
        repetitions: per method and concurrency.
        progress: shown while it runs.

    Raises:
        UserError: a server or the load generator ended.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(llm["model"])
    task = progress.add_task("", total=len(methods) * (1 + len(concurrencies) * repetitions))
    results = {(m.name, c): Result(m.name, c) for c in concurrencies for m in methods}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def load(server: Server, prompts: list[list[int]], concurrency: int) -> Run:
            data = folder / "prompts.jsonl"
            texts = [tokenizer.decode(ids) for ids in prompts]
            data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
            return _load(server, llm["model"], data, len(prompts), max_tokens, temperature, concurrency)

        servers = []
        for method in methods:
            progress.update(task, description=f"starting {method.name}")
            server = stack.enter_context(Server(llm["model"], method.speculative, _flags(llm)))
            server.wait()
            servers.append(server)
            load(server, warm_up, max(concurrencies))
            server.pause()
            progress.advance(task)
        remaining = iter(portions)
        for concurrency in concurrencies:
            for order in orders(len(servers), repetitions):
                prompts = next(remaining)
                for i in order:
                    name = methods[i].name
                    progress.update(task, description=f"{name}, concurrency {concurrency}")
                    servers[i].resume()
                    run = load(servers[i], prompts, concurrency)
                    servers[i].pause()
                    results[name, concurrency].runs.append(run)
                    progress.advance(task)
    return Comparison(list(results.values()))


def _flags(llm: dict[str, Any]) -> list[str]:
    # Prompts share the system prompt, and may repeat; offline the prefix cache is emptied before each run.
    flags = ["--no-enable-log-requests", "--no-enable-prefix-caching"]
    for name, value in llm.items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("model", "disable_log_stats"):
            continue
        if isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags += [flag, str(value)]
    return flags


def _load(
    server: Server,
    model: str,
    data: Path,
    count: int,
    max_tokens: int,
    temperature: float,
    concurrency: int,
) -> Run:
    """One run of `vllm bench serve`, with what vLLM counted meanwhile."""
    before = server.counters()
    result = data.with_name("result.json")
    command = [
        str(Path(sys.executable).with_name("vllm")), "bench", "serve",
        "--backend", "openai", "--endpoint", "/v1/completions", "--base-url", server.url,
        "--model", server.name, "--tokenizer", model,
        "--dataset-name", "custom", "--dataset-path", str(data), "--skip-chat-template",
        "--disable-shuffle", "--custom-output-len", str(max_tokens), "--num-prompts", str(count),
        "--max-concurrency", str(concurrency), "--temperature", str(temperature), "--disable-tqdm",
        "--save-result", "--save-detailed", "--result-dir", str(data.parent), "--result-filename", result.name,
    ]  # fmt: skip
    if temperature:
        command += ["--extra-body", json.dumps({"seed": 0})]
    # The load generator computes nothing: vLLM's threads stay on the cores alone.
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode or not result.exists():
        print("\n".join((done.stdout + done.stderr).splitlines()[-15:]), file=sys.stderr)
        raise UserError("vllm bench serve failed; its last lines are above.")
    found = json.loads(result.read_text())
    result.unlink()
    if found["completed"] != count:
        raise UserError(f"Only {found['completed']} of {count} requests were answered.")
    after = server.counters()
    run = Run(seconds=found["duration"], tokens=found["total_output_tokens"])
    for name, counter in COUNTERS.items():
        setattr(run, name, int(after.get(counter, 0) - before.get(counter, 0)))
    by_depth = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    depth = 0
    while f"{by_depth}[{depth}]" in after:
        key = f"{by_depth}[{depth}]"
        run.accepted_by_depth.append(int(after[key] - before.get(key, 0)))
        depth += 1
    steps = "vllm:iteration_tokens_total_count"
    run.steps = int(after.get(steps, 0) - before.get(steps, 0)) or 1
    run.ttft = found["ttfts"]
    run.itl = [x for own in found["itls"] for x in own]
    run.tpot = [
        sum(own) / (length - 1)
        for own, length in zip(found["itls"], found["output_lens"], strict=True)
        if length > 1
    ]
    run.outputs = [[ord(c) for c in text] for text in found["generated_texts"]]
    return run
