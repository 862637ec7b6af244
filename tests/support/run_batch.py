"""Answers a file of requests in a process of its own; `engines.Script` starts it.

`main` takes {"input", "output", "flags"}; with "reference" vLLM's own `run-batch` does it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any


def main(spec: dict[str, Any]) -> dict[str, int]:
    from run_replicas import fork_engines
    from vllm.entrypoints.launchers import run_batch as vllms

    from clover_vllm.cluster.answering import parse_flags
    from clover_vllm.cluster.batch import run_batch
    from clover_vllm.cluster.settings import BatchSettings

    fork_engines()
    if spec.get("reference"):
        arguments = parse_flags(spec["flags"])
        arguments.input_file, arguments.output_file = spec["input"], spec["output"]
        asyncio.run(vllms.main(arguments))
        return {}
    flags = tuple(spec["flags"])
    return run_batch(BatchSettings(Path(spec["input"]), Path(spec["output"]), flags, at_once=3))
