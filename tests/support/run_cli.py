"""`python run_cli.py OUT ...`: the command line, one process of several; writes which threads outlive it.

OUT.RANK gets a JSON list of the names of the threads that still run when Python is about to end.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from clover_vllm.cli import main

OUT = Path(sys.argv.pop(1))


def write_threads() -> None:
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended meanwhile
            names.append(path.read_text().strip())
    OUT.with_suffix("." + os.environ["RANK"]).write_text(json.dumps(names))


if __name__ == "__main__":
    atexit.register(write_threads)
    main()
