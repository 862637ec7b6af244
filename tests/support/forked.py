"""Engines of `JsonProcess` that need not import vllm, which takes longer than many a test of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from engines import Script

from clover_vllm.launch.process import JsonProcess

LATE = {"KMP_BLOCKTIME", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"}
"""Variables that vLLM reads as an engine starts, not while it is imported."""


class PipedScript(Script):
    """A module of ours that answers on stdout what it is asked on stdin."""

    def __init__(self, module: str, env: dict[str, str]) -> None:
        assert set(env) <= LATE, env
        self._pipes = tempfile.TemporaryDirectory()
        given, answers = (Path(self._pipes.name) / name for name in ("stdin", "stdout"))
        for pipe in (given, answers):
            os.mkfifo(pipe)
        reading = os.open(answers, os.O_RDONLY | os.O_NONBLOCK)
        spec = {"module": module, "stdin": str(given), "stdout": str(answers)}
        super().__init__("run_module", spec, env, anew=False)
        while (writing := _writer(given)) is None:  # it has opened the other one before
            assert not self.ended(0.01), self.log()
        os.set_blocking(reading, True)
        self.stdin, self.stdout = os.fdopen(writing, "w"), os.fdopen(reading)


def _writer(pipe: Path) -> int | None:
    """The pipe's end for writing, once somebody reads it."""
    try:
        writing = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None
    os.set_blocking(writing, True)
    return writing


def fork_json_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all `JsonProcess` fork from the server of `engines.py`; what they do is the same."""

    def start(self: Any, module: str, environment: Mapping[str, str]) -> PipedScript:
        script = PipedScript(module, dict(environment))
        self._log.close()
        self._log = script.open_log()
        return script

    monkeypatch.setattr(JsonProcess, "_start", start)
