"""Runs the scripts beside this file in processes of their own, with the settings in which vLLM is fastest.

A process is forked from a server that has torch and vllm imported (and has computed nothing, so that it has
one thread). With settings that vLLM reads while it is imported, a script gets a Python of its own instead.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

import pytest

from clover_vllm.launch.environment import prepare

Json = dict[str, Any]

FOLDER = Path(__file__).parent
IMPORTED = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.compilation.backends",
    "vllm.lora.resolver",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.models.llama",
    "vllm.entrypoints.launchers.cli_args",
    "compressed_tensors",
    "clover_vllm.engine.worker",
    "clover_vllm.engine.backends.cpu",
    "clover_vllm.engine.models.clover2",
    "clover_vllm.heads.clover2",
]
RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
READ_LATE = {"VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE", *RANKS}
"""Variables that are read as an engine or a rank starts, so that a forked process may have its own."""


def run_engine(
    llm: Json, requests: list[Json], timeout: float = 840, env: dict[str, str] | None = None, **more: Any
) -> Json:
    """Outputs and statistics of requests; see `run_engine.py` for the arguments."""
    found: Json = run_script("run_engine", {"llm": llm, "requests": requests, **more}, timeout, env)
    return found


def run_script(name: str, spec: Any, timeout: float = 840, env: dict[str, str] | None = None) -> Any:
    """What a script beside this file answers to `spec`; see `Script`."""
    with Script(name, spec, env) as script:
        return script.answer(timeout)


class Script:
    """A script beside this file, at work; ended with the context, or by `kill`."""

    def __init__(
        self, name: str, spec: Any, env: dict[str, str] | None = None, anew: bool | None = None
    ) -> None:
        """
        Args:
            name: of the module, which has `main(spec)`.
            spec: given to it; JSON.
            env: environment variables to add.
            anew: start Python anew; by default where `env` has a variable that is read during imports.
        """
        self._name = name
        self._folder = tempfile.TemporaryDirectory()
        given, self._out, self._log = (
            Path(self._folder.name) / file for file in ("spec.json", "out.json", "log.txt")
        )
        given.write_text(json.dumps(spec))
        self._log.touch()
        anew = anew if anew is not None else not READ_LATE.issuperset(env or {})
        self._process: subprocess.Popen[bytes] | BaseProcess
        with prepared(env or {}):
            self._process = (_start_anew if anew else _fork)(name, given, self._out, self._log)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """As of `subprocess.Popen`, like `poll` and `wait`."""
        process = self._process
        return process.returncode if isinstance(process, subprocess.Popen) else process.exitcode

    def poll(self) -> int | None:
        self.ended()
        return self.returncode

    def wait(self, timeout: float | None = None) -> None:
        if not self.ended(timeout):
            raise subprocess.TimeoutExpired(self._name, timeout or 0.0)

    def ended(self, seconds: float | None = 0) -> bool:
        """Whether it ends within some seconds."""
        if isinstance(self._process, subprocess.Popen):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        else:
            self._process.join(seconds)
        return self.returncode is not None

    def log(self, end: int | None = 8000) -> str:
        """The end of all that it printed, of some length; None: all."""
        return self._log.read_text(errors="replace")[-(end or 0) :]

    def open_log(self) -> TextIO:
        """What it prints, for reading."""
        return self._log.open()

    def answer(self, timeout: float = 840) -> Any:
        """What it answers; `timeout` is in seconds."""
        self.ended(timeout)
        code = self.returncode
        assert code == 0, f"{self._name}: exit code {code}\n{self.log()}"
        return json.loads(self._out.read_text())

    def kill(self) -> None:
        """End it and all that it has started, as a power cut would."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()  # should it not lead a group yet
        if isinstance(self._process, subprocess.Popen):
            self._process.wait()
        else:
            self._process.join()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()


@contextmanager
def prepared(env: dict[str, str]) -> Iterator[None]:
    """The environment of engines, in this process for a while."""
    before = dict(os.environ)
    try:
        prepare()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.update(env)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _start_anew(name: str, given: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(FOLDER / "engines.py"), name, str(given), str(out)]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def _fork(name: str, given: Path, out: Path, log: Path) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engines", *IMPORTED])
    process = context.Process(target=_forked, args=(name, given, out, log, dict(os.environ)))
    process.start()
    return process


def _forked(name: str, given: Path, out: Path, log: Path, env: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    missing = [module for module in IMPORTED if module not in sys.modules]
    assert not missing, f"the server could not import {missing}"
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, "a fork takes one thread along"
    gc.freeze()  # vLLM collects garbage several times, but none of this is
    answer(name, given, out)
    atexit._run_exitfuncs()  # a forked process ends without


def answer(name: str, given: Path, out: Path) -> None:
    """Run a script's `main` on one file, into another."""
    out.write_text(json.dumps(importlib.import_module(name).main(json.loads(given.read_text()))))


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


def assert_only_drafts_are_scored(stats: Json, least: int = 10) -> None:
    """Steps without drafts, of which there were some, were left to vLLM's own sampler."""
    by = stats["sampled_by"]
    assert by["vllm, none"] >= least, by
    assert by["scorer, drafts"] >= least, by
    assert by["scorer, none"] == by["vllm, drafts"] == 0, by


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


if __name__ == "__main__":
    answer(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
