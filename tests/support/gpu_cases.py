"""Cases of a GPU check that fail, each in its way; see `test_gpu_engines.py`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any


def crash(spec: dict[str, Any], say: Callable[..., None]) -> None:
    """End the process in the middle."""
    say(before=spec["number"])
    os.abort()


def hang(_: dict[str, Any], say: Callable[..., None]) -> None:
    """Wait for nothing."""
    say(before="hang")
    time.sleep(100)
