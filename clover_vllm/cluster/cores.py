"""Which cores an engine computes on, where several share a host.

vLLM's CPU build binds every engine of a host to the same cores unless it is told otherwise, and Ray counts cores without
naming them. So an engine's process claims the first free ones, by locks that end with it however it ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

_claimed: list[int] = []
"""Descriptors of this process's locks."""


def claim_cores(count: int, ranks: int = 1, folder: Path | None = None) -> str:
    """Claim cores for an engine, until this process ends.

    Args:
        count: of cores, of all ranks together.
        ranks: of the engine (tensor parallelism), which share them evenly.
        folder: of the locks; by default one per user.

    Returns:
        for VLLM_CPU_OMP_THREADS_BIND. Where fewer are free than asked for, all cores, for every rank.
    """
    allowed = sorted(os.sched_getaffinity(0))
    each = max(1, count // ranks)
    place = folder or Path(tempfile.gettempdir()) / f"clover-cores-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    taken: list[int] = []
    locks: list[int] = []
    for core in allowed:
        if len(taken) == each * ranks:
            break
        lock = os.open(place / str(core), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        taken.append(core)
        locks.append(lock)
    if len(taken) < each * ranks:
        for lock in locks:
            os.close(lock)
        return "|".join([_list(allowed)] * ranks)
    _claimed.extend(locks)
    return "|".join(_list(taken[i * each : (i + 1) * each]) for i in range(ranks))


def _list(cores: Sequence[int]) -> str:
    return ",".join(map(str, cores))
