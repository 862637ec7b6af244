"""How long tests are. The short form decides whether a change may land; `make soak` runs the full one."""

from __future__ import annotations

import os

FULL = os.environ.get("CLOVER_TEST_LENGTH") == "full"


def length(short: int, full: int) -> int:
    """How many or how much of whatever a test repeats."""
    return full if FULL else short
