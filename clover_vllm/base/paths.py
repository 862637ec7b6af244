"""Where clover-vllm keeps what it makes for itself."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`CLOVER_HOME`, by default `clover-vllm` in the user's cache folder (XDG_CACHE_HOME)."""
    named = os.environ.get("CLOVER_HOME")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "clover-vllm"


def shipped_head() -> Path:
    """The Clover-2 head for SmolLM2-135M-Instruct that is part of the package."""
    return Path(__file__).parents[1] / "shipped" / "smollm2-135m-clover2"
