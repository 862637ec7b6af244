"""Reading the section "Args" of a docstring."""

from __future__ import annotations

import inspect
import re


def argument_texts(docstring: str) -> dict[str, str]:
    """By name, what the section "Args" says, on one line each."""
    section = inspect.cleandoc(docstring).partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^ {4}(\w+): ", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}
