"""Prompt files: JSON lines with `prompt`, `messages` or `turns`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import expand, open_text

HELD_OUT_ONE_IN = 50


@dataclass(frozen=True)
class Prompt:
    """One conversation that the target is to continue."""

    source: str  # `source` or `category` of the line, else the file's name
    messages: list[dict[str, Any]]  # chat messages, the last one not the assistant's
    where: str = field(default="", compare=False)  # file and line, for error messages

    @property
    def text(self) -> str:
        """The user's words; what the hold-out rule looks at."""
        return "\n".join(str(m["content"]) for m in self.messages if m["role"] == "user")

    @property
    def held_out(self) -> bool:
        """The fixed 2% that nothing is trained on: sha1 of the prompt is a multiple of 50."""
        return int(hashlib.sha1(self.text.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """Read prompt files. Of `turns` only the first is asked: later ones need the answers before them.

    Raises:
        UserError: a file is missing, a line is malformed or a prompt empty (names the line), or
            there is none.
    """
    prompts: list[Prompt] = []
    for file in expand(paths):
        for number, line in enumerate(open_text(file), 1):
            if line.strip():
                prompts.append(_parse(line, f"{file}, line {number}", file.name.split(".")[0]))
    if not prompts:
        raise UserError(f"{paths[0]} holds no prompt.")
    return prompts


def _parse(line: str, where: str, default_source: str) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object.")
    messages = _messages(row, where)
    source = row.get("source") or row.get("category") or default_source
    return Prompt(str(source), messages, where)


def _messages(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    if "messages" in row:
        messages = row["messages"]
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(m, dict) and m.get("role") and "content" in m for m in messages)
        ):
            raise UserError(f"{where}: messages must be a list of objects with role and content.")
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    elif "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where}: turns must be a list of texts.")
        messages = [{"role": "user", "content": turns[0]}]
    elif "prompt" in row:
        messages = [{"role": "user", "content": row["prompt"]}]
    else:
        raise UserError(f"{where}: needs one of prompt, messages or turns.")
    if not messages or not all(isinstance(m["content"], str) and m["content"].strip() for m in messages):
        raise UserError(f"{where}: the prompt is empty.")
    return messages
