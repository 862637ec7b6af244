"""One engine of a benchmark, in a process of its own.

Reads one JSON object per line on stdin and answers with one on stdout. The first is
`{"llm": {...}}`, arguments of vllm.LLM; then each `{"requests": [...], "concurrency": c}` is a run.
The engine core lives in this process, so that its times can be read.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO


@dataclass
class Run:
    """One measurement (filled by `measure`)."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    decode_steps: int = 0  # those before which no request arrived
    decode_seconds: float = 0.0
    drafts: int = 0  # drafts verified, one per request and step
    draft_tokens: int = 0
    accepted: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)  # seconds, per request
    tpot: list[float] = field(default_factory=list)  # seconds per output token after the first
    itl: list[float] = field(default_factory=list)  # seconds between outputs, any request
    parts: dict[str, float] = field(default_factory=dict)  # seconds by part of decode steps, Clover only
    outputs: list[list[int]] = field(default_factory=list)


def serve(answers: TextIO) -> None:
    """Answer commands until stdin ends."""
    from vllm import LLM

    settings = json.loads(sys.stdin.readline())
    llm = LLM(**settings["llm"])
    _say(answers, {"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        _say(answers, asdict(measure(llm, command["requests"], command["concurrency"])))


def measure(llm: Any, requests: list[dict[str, Any]], concurrency: int) -> Run:
    """Keep `concurrency` requests running until all are done.

    Args:
        llm: a vllm.LLM with its engine core in this process.
        requests: [{"prompt": token ids, "params": SamplingParams arguments}].
        concurrency: most requests at a time.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    llm.reset_prefix_cache()
    engine, run = llm.llm_engine, Run()
    before, parts = _counters(llm), _parts(llm)
    arrived: dict[str, float] = {}
    last: dict[str, float] = {}
    first: dict[str, float] = {}
    outputs: dict[str, list[int]] = {}
    queue = list(enumerate(requests))[::-1]
    running = 0
    started = time.perf_counter()
    while queue or running:
        begun, decodes = time.perf_counter(), not (queue and running < concurrency)
        while queue and running < concurrency:
            i, request = queue.pop()
            name = f"{started}-{i}"
            outputs[name], arrived[name] = [], time.perf_counter()
            engine.add_request(
                name,
                TokensPrompt(prompt_token_ids=request["prompt"]),
                SamplingParams(**request["params"], output_kind=RequestOutputKind.DELTA),
            )
            running += 1
        run.steps += 1
        for output in engine.step():
            now, name = time.perf_counter(), output.request_id
            tokens = output.outputs[0].token_ids
            if tokens:
                if name in last:
                    run.itl.append(now - last[name])
                else:
                    first[name] = now
                    run.ttft.append(now - arrived[name])
                last[name] = now
                outputs[name] += tokens
            if output.finished:
                running -= 1
                count = len(outputs[name])
                if count > 1:
                    run.tpot.append((last[name] - first[name]) / (count - 1))
        run.decode_steps += decodes
        run.decode_seconds += decodes * (time.perf_counter() - begun)
    run.seconds = time.perf_counter() - started
    run.outputs = list(outputs.values())
    run.tokens = sum(map(len, run.outputs))
    after = _counters(llm)
    run.drafts = after["drafts"] - before["drafts"]
    run.draft_tokens = after["draft_tokens"] - before["draft_tokens"]
    run.accepted = after["accepted"] - before["accepted"]
    run.accepted_by_depth = [
        a - b for a, b in zip(after["by_depth"], before["by_depth"] or [0] * 99, strict=False)
    ]
    run.parts = {name: value - parts.get(name, 0.0) for name, value in _parts(llm).items()}
    return run


def _counters(llm: Any) -> dict[str, Any]:
    """vLLM's own counters of speculation."""
    names = {
        "vllm:spec_decode_num_drafts": "drafts",
        "vllm:spec_decode_num_draft_tokens": "draft_tokens",
        "vllm:spec_decode_num_accepted_tokens": "accepted",
    }
    found: dict[str, Any] = {"drafts": 0, "draft_tokens": 0, "accepted": 0, "by_depth": []}
    for metric in llm.get_metrics():
        if metric.name in names:
            found[names[metric.name]] += metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            found["by_depth"] = list(metric.values)
    return found


def _parts(llm: Any) -> dict[str, float]:
    """Seconds by part of a step from Clover's runner, nothing from others."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    timer = getattr(runner, "timer", None)
    return dict(timer.seconds) if timer is not None else {}


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    # vLLM prints to stdout; answers keep a stream of their own.
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(own)
