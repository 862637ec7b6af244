"""What a process has started ends with it, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

PARENT = """
import subprocess, sys, time
from clover_vllm.launch.reaper import reaped
with reaped():
    grandchild = "import subprocess, sys; subprocess.run(['sleep', '100'])"
    subprocess.Popen([sys.executable, "-c", grandchild], start_new_session=True)
    time.sleep(float(sys.argv[1]))
"""


def descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Once the grandchild's sleep has begun, and a look of the reaper's behind it."""
    for _ in range(200):
        found = psutil.Process(process.pid).children(recursive=True)
        if any(p.name() == "sleep" for p in found):
            time.sleep(3.0)
            return found
        time.sleep(0.1)
    raise AssertionError("no grandchild")


def ended(process: psutil.Process) -> bool:
    try:
        process.wait(20)
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_process_that_was_killed(how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, "100"]) as process:
        found = descendants(process)
        assert len(found) == 3
        process.send_signal(how)
        process.wait()
        assert all(ended(one) for one in found)


@pytest.mark.slow
def test_one_that_ends_by_itself_leaves_what_it_wants() -> None:
    """The reaper goes before it."""
    with subprocess.Popen([sys.executable, "-c", PARENT, "8"]) as process:
        found = descendants(process)
        process.wait()
    time.sleep(1.0)
    assert sorted(p.name() for p in found if p.is_running() and p.status() != "zombie") != []
    for one in found:
        if one.is_running():
            one.kill()
