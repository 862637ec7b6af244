"""Triton kernels on a CPU: right in Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from length import FULL
from typer.testing import CliRunner

from clover_vllm.bench.kernels_compiled import SHAPES, CompiledShape, compile_attention, compile_others
from clover_vllm.cli import app

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_kernels_are_right_in_the_interpreter() -> None:
    """`tests/interpreted`, in a process of its own, since Triton chooses when it is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "quick_interpreter",
            "-n0",
            "tests/interpreted",
        ],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_kernels_compile_without_a_gpu_and_spill_nothing(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for shape in (CompiledShape(), CompiledShape(splits=8), *(SHAPES if FULL else ())):
        if shape.is_known(capability):
            found = compile_attention(shape, capability)
            assert [made.kernel for made in found] == ["attention_kernel", "merge_kernel"][: len(found)]
            assert len(found) == (2 if shape.splits > 1 else 1)
            assert all(made.registers > 0 for made in found)
            if shape.dim == 128:
                assert [made.spilled for made in found] == [0] * len(found), shape
    assert [(made.kernel, made.spilled) for made in compile_others(capability)] == [
        ("walk_kernel", 0),
        ("move_kernel", 0),
        ("put_kernel", 0),
        ("lay_out_kernel", 0),
        ("lay_out_kernel", 0),
        ("rows_kernel", 0),
        ("rows_kernel", 0),
        ("count_kernel", 0),
    ]


def test_the_recorded_kernels_spill_nothing_at_head_size_128() -> None:
    """What the table in docs/correctness.md is made from."""
    found = json.loads((ROOT / "results" / "kernels-compiled.json").read_text())["results"]
    assert {made["capability"] for made in found} == {80, 89, 90, 100}
    assert {made["shape"] for made in found} >= {str(shape) for shape in SHAPES}
    assert not any(made["spilled"] for made in found if "head size 128" in made["shape"])


@pytest.mark.parametrize(
    ("environment", "options", "named"),
    [({"TRITON_INTERPRET": "1"}, [], "TRITON_INTERPRET"), ({}, ["--capabilities", "75"], "75")],
)
def test_what_cannot_be_compiled_is_refused_in_a_sentence(
    environment: dict[str, str], options: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["kernels-compiled", *options])
    assert done.exit_code == 2
    assert named in done.output
    assert done.output.strip().endswith(".")
    assert len(done.output.strip().splitlines()) == 1
