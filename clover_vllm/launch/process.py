"""Child processes that compute: asked and answering in lines of JSON, with a log to show when they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from clover_vllm.base.errors import UserError

LOG_LINES = 15
"""Lines of a log that are shown when a process has ended."""


def open_log() -> TextIO:
    """A file in memory for the output of a process."""
    return open(os.memfd_create("log"), "w+")


def show_tail(log: TextIO) -> None:
    """Print the end of a log on stderr; an engine core's own errors stand above its server's."""
    log.seek(0)
    lines = log.read().strip().splitlines()
    errors = [line for line in lines if "EngineCore" in line and "ERROR" in line]
    print("\n".join([*errors[-LOG_LINES:], *lines[-LOG_LINES:]]), file=sys.stderr)


class JsonProcess:
    """A Python module that answers each line of JSON on stdin with one on stdout."""

    def __init__(self, module: str, name: str, environment: Mapping[str, str] | None = None) -> None:
        """
        Args:
            module: run as `python -m module`.
            name: for messages.
            environment: added to this process's.
        """
        self.name = name
        self._log = open_log()
        self._process = self._start(module, environment or {})

    def _start(self, module: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **environment},
        )

    def tell(self, command: dict[str, Any]) -> None:
        """Send a command without waiting for the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `hear` says so

    def hear(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            UserError: the process ended; the end of its log has been printed.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            show_tail(self._log)
            raise UserError(f"The engine for {self.name} ended; its last lines are above.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """`tell`, then `hear`."""
        self.tell(command)
        return self.hear()

    def close(self) -> None:
        """End the process: by the end of its input, else by force."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> JsonProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Parent:
    """Who asks, as a module sees it that a `JsonProcess` runs. What the module prints from now on goes to the log."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # vLLM and its libraries print to stdout

    def commands(self) -> Iterator[dict[str, Any]]:
        """What is asked, until nothing more will be."""
        for line in sys.stdin:
            yield json.loads(line)

    def say(self, answer: Mapping[str, Any]) -> None:
        """Answer a command."""
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()
