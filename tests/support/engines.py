"""Runs scripts beside this file in processes of their own, with the settings in which vLLM is fastest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from clover_vllm.launch.environment import prepare

Json = dict[str, Any]


def run_engine(
    llm: Json, requests: list[Json], timeout: float = 840, env: dict[str, str] | None = None, **more: Any
) -> Json:
    """Outputs and statistics of requests; see `run_engine.py` for the arguments."""
    found: Json = run_script("run_engine.py", {"llm": llm, "requests": requests, **more}, timeout, env)
    return found


def run_script(name: str, spec: Json, timeout: float = 840, env: dict[str, str] | None = None) -> Any:
    """What a script beside this file answers to `spec`."""
    before = dict(os.environ)
    try:
        prepare()
        settings = {**os.environ, **(env or {})}
    finally:
        os.environ.clear()
        os.environ.update(before)
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "spec.json", Path(folder) / "out.json"
        given.write_text(json.dumps(spec))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / name), str(given), str(out)],
            env=settings,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return json.loads(out.read_text())


def tokens_of(run: Json) -> list[list[list[int]]]:
    """Token ids by request, by sequence."""
    return [[sequence["tokens"] for sequence in outputs] for outputs in run["outputs"]]


def differing(a: Json, b: Json) -> int:
    """Tokens that differ between two runs of the same requests, missing ones included."""
    count = 0
    for one, other in zip(tokens_of(a), tokens_of(b), strict=True):
        for x, y in zip(one, other, strict=True):
            count += sum(p != q for p, q in zip(x, y, strict=False)) + abs(len(x) - len(y))
    return count


def assert_same(plain: Json, trees: Json, chosen: Iterable[int]) -> None:
    """Every sequence of the chosen requests is the same: tokens, text, ends and logprobs."""
    for i in chosen:
        for one, other in zip(plain["outputs"][i], trees["outputs"][i], strict=True):
            for key in ("tokens", "text", "finish", "stop"):
                assert one[key] == other[key], f"{key} of request {i}"
            for key in ("logprobs", "prompt_logprobs"):
                assert (one[key] is None) == (other[key] is None)
                for position, again in zip(one[key] or [], other[key] or [], strict=True):
                    assert [(t, rank) for t, _, rank in position] == [(t, rank) for t, _, rank in again]
                    expected = pytest.approx([p for _, p, _ in again], abs=1e-4)
                    assert [p for _, p, _ in position] == expected
