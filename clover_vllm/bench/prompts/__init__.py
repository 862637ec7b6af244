"""Prompts to measure with, which no head was trained on. README.md beside this file says where they come from."""

from __future__ import annotations

from pathlib import Path

from clover_vllm.base.errors import UserError

PROMPT_SETS = ("families", "text-heavy", "prompt-heavy")


def prompt_set(name: str) -> Path:
    """The file of a prompt set, for `fitting_prompts` and `clover-vllm bench --prompts`.

    Raises:
        UserError: no set has this name.
    """
    if name not in PROMPT_SETS:
        raise UserError(f"Prompt set {name!r} is not known; choose from {', '.join(PROMPT_SETS)}.")
    return Path(__file__).with_name(f"{name}.jsonl.gz")
