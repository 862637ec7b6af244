"""`clover-vllm gpu-check` as far as a CPU shows it: what it records, and an engine whose acceptance is forced."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import gpu_cases
import pytest
import torch
from typer.testing import CliRunner

from clover_vllm.bench.gpu.cases import CaseFunction, Machine, Report, run_case
from clover_vllm.bench.gpu.sections import PREFIX, read_trace
from clover_vllm.bench.gpu.shapes import METHODS
from clover_vllm.check.exactness import CASES, count_differences, judge, tie_gap

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine() -> Machine:
    return Machine(time.monotonic() + 100)


def case(function: CaseFunction, machine: Machine, seconds: float) -> Json:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    spec = {"environment": {"PYTHONPATH": paths}, "number": 7}
    return run_case(function, spec, machine, seconds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_the_command_says_so() -> None:
    from clover_vllm.cli import app

    result = CliRunner().invoke(app, ["gpu-check", "step"])
    assert result.exit_code == 2
    assert "no GPU" in result.output


def test_a_crash_costs_one_case_and_keeps_what_was_found(machine: Machine, tmp_path: Path) -> None:
    found = case(gpu_cases.crash, machine, 60)
    assert found["before"] == 7
    assert "status -6" in found["error"]
    report = Report(tmp_path / "gpu-some.json", {})
    report.add("crash", found)
    report.add("good", {"ok": True})
    written = json.loads(report.file.read_text())
    assert not written["ok"]
    assert list(written["cases"]) == ["crash", "good"]


def test_a_case_that_hangs_says_where(machine: Machine) -> None:
    found = case(gpu_cases.hang, machine, 16)
    assert found["before"] == "hang"
    assert any("gpu_cases.py" in line for line in found["log"])


def test_near_ties_and_others_are_told_apart() -> None:
    def outputs(*tokens: int, logprobs: Any = None) -> list[list[Json]]:
        return [[{"tokens": list(tokens), "text": "", "finish": "length", "stop": None, "logprobs": logprobs, "prompt_logprobs": None}]]  # fmt: skip

    listed = [[(5, -0.1, 1), (6, -3.0, 2)], [(7, -0.70, 1), (8, -0.75, 2), (9, -4.0, 3)]]
    plain, near, far = outputs(5, 7, logprobs=listed), outputs(5, 8), outputs(5, 9)
    assert tie_gap(plain[0][0], near[0][0]) == pytest.approx(0.05)
    greedy: list[Json] = [{"params": {"temperature": 0.0}}]
    assert count_differences(plain, plain, greedy, exact=True)["differ"] == 0
    assert count_differences(plain, near, greedy, exact=False)["not near ties"] == 0
    assert count_differences(plain, far, greedy, exact=False)["not near ties"] == 1
    assert count_differences(plain, far, greedy, exact=False)["tokens that differ"] == 1


def test_other_answers_lost_blocks_and_untried_paths_are_problems(tmp_path: Path) -> None:
    jobs = {"features": {"requests": [{"params": {"temperature": 0.0}}]}}
    tried = ("accepted_in_branching", "moved", "mixed_steps", "preempted", "cached_tokens")
    stats = {"leaked_blocks": 0, **dict.fromkeys(tried, 1)}
    known, said = tmp_path / "plain.json", tmp_path / "trees.json"

    def write(file: Path, tokens: list[int]) -> None:
        one: Json = {"tokens": tokens, "text": "", "finish": "length", "stop": None}
        outputs = [[{**one, "logprobs": None, "prompt_logprobs": None}]]
        file.write_text(json.dumps({"features": {"outputs": outputs}}))

    def problems(tokens: list[int], **changes: int) -> Any:
        write(said, tokens)
        return judge(CASES[0], {"features": {**stats, **changes}}, known, said, jobs)["problems"]

    write(known, [5, 7])
    assert "error" in judge(CASES[0], {}, known, said, jobs)
    assert problems([5, 7]) == []
    assert problems([5, 8]) == ["features: answers differ"]
    assert problems([5, 7], leaked_blocks=2) == ["features: blocks were lost"]
    assert problems([5, 7], moved=0) == ["features: moved is 0"]


def test_launches_are_counted_by_part() -> None:
    def event(cat: str, name: str, ts: float, dur: float, **args: int) -> Json:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}

    events = [
        event("user_annotation", f"{PREFIX}walk", 10, 20),
        event("cuda_driver", "cuLaunchKernelEx", 12, 2, correlation=1),
        event("cuda_runtime", "cudaMemcpyAsync", 15, 2, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 40, 2, correlation=3),
        event("kernel", "_walk_kernel", 50, 6, correlation=1),
        event("kernel", "other", 60, 9, correlation=3),
    ]
    assert read_trace({"traceEvents": events}, steps=2) == {
        "walk": {"launches": 0.5, "copies": 0.5, "GPU us": 3.0, "host us": 10.0, "calls": 0.5}
    }


def test_forced_paths_exist() -> None:
    for method in METHODS[1:]:
        assert len(method.shape) == method.nodes
        assert max(method.accepted) <= method.shape.max_depth


@pytest.mark.engine
def test_an_engine_is_watched_and_accepts_what_is_forced(tmp_path: Path) -> None:
    from clover_vllm.bench.gpu.step import check_step
    from clover_vllm.check.gpu_models import make_models

    models = make_models("tiny", tmp_path)
    assert check_step(tmp_path, Machine(time.monotonic() + 300, interpret=True), models)
    found = json.loads((tmp_path / "gpu-step.json").read_text())["cases"]["tree of 16"]
    # Two steps of two requests: each accepts two of the lengths that take turns.
    assert 1 + 1.5 <= found["tokens per step and request"] <= 1 + 3.5
    assert {"walk", "compaction", "growth", "drafting"} <= found["parts us, 2 requests"].keys()
    assert found["trace, 1 requests"]["drafting"]["calls"] == 1
