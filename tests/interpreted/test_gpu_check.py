"""`clover-vllm gpu-check kernels` in Triton's interpreter: the same code with small steps, but for graphs and events."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from clover_vllm.attention.triton.tree_attention import tree_attention
from clover_vllm.bench.gpu import kernel_checks, kernel_times, kernels
from clover_vllm.bench.gpu.kernel_checks import FP8, Kind
from clover_vllm.bench.gpu.kernel_times import Limits, Point
from clover_vllm.bench.gpu.kernels import Plan
from clover_vllm.launch.interpreter import interpret

checked = interpreter_builder.options
interpret()  # else vLLM's CPU build takes Triton for absent
interpreter_builder.options = checked  # other tests of this process want to know of overflows

SMALL = Kind("float32", dim=64, group=1, kv_heads=1, rows=5, longest=20)
PLAN = Plan(
    Limits(memory=1 << 24, cache=1 << 14, copied=1 << 10, threads=1),
    kinds=[
        replace(SMALL, splits=2, group=2, all_rows=True),
        replace(SMALL, dtype="float16", cache=FP8, query=FP8, layout="BLNHC"),
        replace(SMALL, dtype="float16", window=9, group=3, layout="LBHNC"),
    ],
    draws=2,
    graphs=[replace(SMALL, splits=2)],
    trees=6,
    points=[
        Point(1, 20, rows=3, heads=2, kv_heads=1, dim=64, tuned=True),
        Point(2, 20, rows=3, heads=2, kv_heads=1, dim=64),
        Point(100, 40_000),
    ],
    others=[(2, 2, 5, 4)],
)


def found_by(plan: Plan, folder: Path, seconds: float = 600.0) -> tuple[bool, dict[str, Any]]:
    ok = kernels.run(plan, folder, seconds)
    return ok, json.loads((folder / "gpu-kernels.json").read_text())


def test_all_of_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "SPLITS", (1, 2, 4))
    monkeypatch.setattr(kernel_times, "TILINGS", kernel_times.TILINGS[:1])
    ok, found = found_by(PLAN, tmp_path)
    results = found["results"]
    assert ok, results
    counts = {name: len(section) for name, section in results.items()}
    assert counts == {
        "attention": 3,
        "graphs": 1,
        "walk": 3,
        "move": 3,
        "bandwidth": 1,
        "others": 1,
        "times": 3,
    }
    assert all(0 < one["error"] < one["bound"] for one in results["attention"])
    tuned, plain, large = results["times"]
    assert large["why"] == "it does not fit"
    assert tuned["tilings"]
    for one in (tuned, plain):
        times = [one[name] for name in ("floor", "rule", "flash", "vllm")]
        assert one["vllm_differs"] < 1e-2
        assert all(time > 0 for time in [*times, *one["splits"].values()])


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(
        query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor, *more: Any, **named: Any
    ) -> None:
        tree_attention(query, cache, output, *more, **named)
        output[0] *= 1.1

    monkeypatch.setattr(kernel_checks, "tree_attention", attend)
    plan = Plan(PLAN.limits, PLAN.kinds[:1], 1, PLAN.graphs, 3, points=[], others=[])
    ok, found = found_by(plan, tmp_path)
    assert not ok
    assert "relative error" in found["results"]["attention"][0]["why"]
    assert all(one["ok"] for one in found["results"]["walk"])


def test_nothing_begins_when_the_time_is_over(tmp_path: Path) -> None:
    ok, found = found_by(PLAN, tmp_path, seconds=0.0)
    assert not ok
    assert all(one["ok"] is None for section in found["results"].values() for one in section)
