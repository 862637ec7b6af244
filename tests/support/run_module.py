"""A module that answers lines on stdin, in a forked process; `forked.fork_json_processes` starts it."""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any


def main(spec: dict[str, Any]) -> None:
    """`spec` is {"module", "stdin": a pipe's path, "stdout": another's}."""
    os.dup2(os.open(spec["stdout"], os.O_WRONLY), 1)
    os.dup2(os.open(spec["stdin"], os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)
    runpy.run_module(spec["module"], run_name="__main__")
