"""Ends what a process has started, should it be killed: `python -m clover_vllm.launch.reaper` beside it.

vLLM's engine core does not notice that the process which started it is gone (vLLM issue 55510): after a SIGKILL, or where
the kernel ends the largest process, engine and worker would keep their memory and cores for ever.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

LOOK_EVERY = 0.5
"""Seconds between two looks at who there is; who is started and orphaned between two looks is missed."""


def start_reaper() -> subprocess.Popen[bytes]:
    """From now on the end of this process is the end of its descendants, unless the process returned is ended before."""
    return subprocess.Popen(
        [sys.executable, "-m", "clover_vllm.launch.reaper", str(psutil.Process().pid)],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the others
    )


@contextmanager
def reaped() -> Iterator[None]:
    """While the block runs, the end of this process is the end of its descendants."""
    watcher = start_reaper()
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()


def watch(pid: int) -> None:
    """Until a process ends; then end the descendants that it had."""
    known: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            known.update(process.children(recursive=True))
            time.sleep(LOOK_EVERY)
    known.discard(psutil.Process())
    for left in known:
        with suppress(psutil.NoSuchProcess):
            left.kill()


if __name__ == "__main__":
    watch(int(sys.argv[1]))
