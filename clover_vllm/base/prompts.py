"""Prompt files: JSON lines with `prompt`, `messages` or `turns`, or with token ids as `prompt_ids`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
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
    ids: list[int] | None = None  # the prompt as token ids, of lines that have nothing else
    where: str = field(default="", compare=False)  # file and line, for error messages

    @property
    def text(self) -> str:
        """The user's words; what the hold-out rule looks at."""
        return "\n".join(str(m["content"]) for m in self.messages if m["role"] == "user")

    @property
    def held_out(self) -> bool:
        """The fixed 2% that nothing is trained on: sha1 of the prompt is a multiple of 50."""
        return int(hashlib.sha1(self.text.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def read_prompts(paths: Sequence[Path], allow_ids: bool = False) -> list[Prompt]:
    """Read prompt files. Of `turns` only the first is asked: later ones need the answers before them.

    Args:
        paths: files, or folders of them.
        allow_ids: also take lines with `prompt_ids` alone, as answer files have.

    Raises:
        UserError: a file is missing, a line is malformed or a prompt empty (names the line), or
            there is none.
    """
    prompts = list(each_prompt(paths, allow_ids))
    if not prompts:
        raise UserError(f"{paths[0]} holds no prompt.")
    return prompts


def each_prompt(paths: Sequence[Path], allow_ids: bool = False) -> Iterator[Prompt]:
    """`read_prompts` one by one, for who needs the first few only; none is no error here."""
    for file in expand(paths):
        for number, line in enumerate(open_text(file), 1):
            if line.strip():
                yield _parse(line, f"{file}, line {number}", file.name.split(".")[0], allow_ids)


def token_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """A prompt's tokens, through the chat template where the tokenizer has one.

    Args:
        prompt: as read.
        tokenizer: of transformers; prompts that are token ids do without.

    Raises:
        UserError: the template refuses it, or nothing is left of it (names the line).
    """
    if prompt.ids is not None:
        return prompt.ids
    try:
        if getattr(tokenizer, "chat_template", None):
            encoded = tokenizer.apply_chat_template(
                prompt.messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        else:
            encoded = tokenizer(prompt.text)
    except Exception as error:  # a template may raise anything, for roles it does not know say
        raise UserError(
            f"{prompt.where}: the target's chat template refuses this prompt ({error})."
        ) from error
    ids = list(encoded["input_ids"])
    if not ids:
        raise UserError(f"{prompt.where}: the prompt has no tokens.")
    return ids


def _parse(line: str, where: str, default_source: str, allow_ids: bool) -> Prompt:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object.")
    source = str(row.get("source") or row.get("category") or default_source)
    if allow_ids and "prompt_ids" in row:
        ids = row["prompt_ids"]
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{where}: prompt_ids must be a list of token ids.")
        return Prompt(source, [], ids, where)
    return Prompt(source, _messages(row, where), where=where)


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
