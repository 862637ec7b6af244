"""A server whose end can be watched."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from engines import Script

from clover_vllm.launch.server import Server


class WatchedServer(Server):
    """`Server` with what only tests ask for."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self, seconds: float) -> bool:
        """Whether the server ends by itself within some seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def log(self) -> str:
        """All that the server printed."""
        descriptor = self._log.fileno()  # the server's own place in the file stays where it is
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")


class ForkedServer(WatchedServer):
    """A server whose processes are forked and find vllm imported: it starts in a quarter of the time.

    `tests/server/test_starts.py` starts the command itself, as users do.
    """

    def _start(self, command: list[str]) -> Any:
        self._script = Script("run_vllm", {"arguments": command[1:]})
        return self._script

    def log(self) -> str:
        return self._script.log(None)

    def _tail(self) -> str:
        return self.log()

    def stop(self) -> None:
        super().stop()
        self._script.__exit__()
