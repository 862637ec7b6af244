"""Engines of a host share its cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clover_vllm.cluster import cores
from clover_vllm.cluster.cores import claim_cores


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(cores, "_claimed", [])


def test_engines_get_cores_of_their_own_while_there_are_any(tmp_path: Path) -> None:
    assert claim_cores(2, folder=tmp_path) == "0,1"
    assert claim_cores(4, ranks=2, folder=tmp_path) == "2,3|4,5"
    assert claim_cores(3, folder=tmp_path) == "0,1,2,3,4,5,6,7"
    assert claim_cores(2, folder=tmp_path) == "6,7"


def test_cores_of_a_process_that_was_killed_are_free_again(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib\n"
        "os.sched_getaffinity = lambda _: set(range(8))\n"
        "from clover_vllm.cluster.cores import claim_cores\n"
        "print(claim_cores(2, folder=pathlib.Path(sys.argv[1])))\n"
        "sys.stdout.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "0,1\n"
    assert claim_cores(2, folder=tmp_path) == "0,1"
