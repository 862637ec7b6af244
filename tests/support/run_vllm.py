"""The command `vllm` in a process forked from one that has it imported; `watched.ForkedServer` starts it."""

from __future__ import annotations

import sys
from typing import Any


def main(spec: dict[str, Any]) -> None:
    """`spec` is {"arguments": of the command}."""
    from run_replicas import fork_engines
    from vllm.entrypoints.cli.main import main as vllm

    fork_engines()
    sys.argv = ["vllm", *spec["arguments"]]
    vllm()
