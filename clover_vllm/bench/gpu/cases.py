"""Cases of a GPU check: each in a process with a time limit, and each result in a file as soon as it is there."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clover_vllm import PLUGIN
from clover_vllm.base.files import make_folder, write_json
from clover_vllm.base.provenance import provenance

Json = dict[str, Any]

CaseFunction = Callable[[Json, Callable[..., None]], None]
"""A function of a module: takes a specification, and `say(**found)`, which keeps what is found so far."""

CHILD = "clover_vllm.bench.gpu.child"
LOG_LINES = 60
"""Lines of a process's log that are kept where it fails."""

SHORTEST = 20.0
"""Seconds below which no case begins."""


@dataclass
class Machine:
    """Where the cases run.

    Args:
        until: of `time.monotonic`, when all must be over.
        interpret: in Triton's interpreter, on a CPU.
        quick: fewer cases.
    """

    until: float
    interpret: bool = False
    quick: bool = False

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()


@dataclass
class Report:
    """Results of a part of the check, in a file that is whole at any time."""

    file: Path
    settings: Json
    cases: dict[str, Json] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        make_folder(self.file.parent)
        self._provenance = provenance()
        self.write()

    def add(self, name: str, result: Json) -> None:
        """Record a case; `result["ok"]` says whether it is as it should be, or is missing where nothing is judged."""
        self.cases[name] = result
        self.write()
        said = "FAILED" if "error" in result or not result.get("ok", True) else "ok"
        why = str(result["error"]).strip().splitlines()[-1] if "error" in result else ""
        print(f"{self.file.stem}: {name}: {said} {why}", flush=True)

    @property
    def ok(self) -> bool:
        """Whether there are cases, and none failed."""
        return bool(self.cases) and all(
            "error" not in case and case.get("ok", True) for case in self.cases.values()
        )

    def write(self) -> None:
        """Once more, as it is now."""
        write_json(
            self.file,
            {
                "provenance": self._provenance,
                "settings": self.settings,
                "seconds": round(time.monotonic() - self.started, 1),
                "ok": self.ok,
                "cases": self.cases,
            },
        )


def run_case(function: CaseFunction, spec: Json, machine: Machine, seconds: float) -> Json:
    """Call a function in a process of its own.

    Args:
        function: found by its name there.
        spec: of JSON.
        machine: where, and until when.
        seconds: most that it may take.

    Returns:
        what it said; with "error", and the end of its log, where it failed or did not end in time.
    """
    seconds = min(seconds, machine.left)
    if machine.left < SHORTEST:
        return {"error": "not begun: no time was left"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        more = {"seconds": seconds, "interpret": machine.interpret, "command": sys.argv}
        name = f"{function.__module__}:{function.__qualname__}"
        whole = {**spec, "function": name, **more}
        (folder / "spec.json").write_text(json.dumps(whole))
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", CHILD, str(folder)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_environment(folder, machine, spec.get("environment", {})),
            )
            try:
                process.wait(seconds + 5)  # the process ends itself in time, saying where it hangs
            except subprocess.TimeoutExpired:
                pass
            finally:
                _end_group(process)
        answer = folder / "answer.json"
        found: Json = json.loads(answer.read_text()) if answer.exists() else {}
        if not found.pop("done", False):
            found.setdefault("error", f"the process ended with status {process.returncode}")
            found["log"] = (folder / "log").read_text(errors="replace").splitlines()[-LOG_LINES:]
    found["case seconds"] = round(time.monotonic() - started, 1)
    return found


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what a case started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(folder: Path, machine: Machine, more: dict[str, str]) -> dict[str, str]:
    """Of a case: in this process's, with vLLM's entry points of ours where no installed package brings them."""
    site = _entry_points(folder)
    paths = [str(site), str(Path(__file__).parents[3]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",  # a machine without a network may not know its own name
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
        **({"TRITON_INTERPRET": "1"} if machine.interpret else {}),
        **({} if importlib.util.find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}),
    }
    return {**os.environ, **own, **more}


def _entry_points(folder: Path) -> Path:
    """A folder for PYTHONPATH, whose package metadata make vLLM load our plugin in each of its processes."""
    group = "vllm.general_plugins"
    lines = [f"[{group}]", "clover_gpu_check = clover_vllm.bench.gpu.flash:stand_in_for_flash_attention"]
    if not any(found.name == "clover" for found in importlib.metadata.entry_points(group=group)):
        lines.append(f"clover = {PLUGIN}")
    site = folder / "site"
    info = site / "clover_vllm_gpu_check-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clover-vllm-gpu-check\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return site
