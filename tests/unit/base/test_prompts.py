"""Prompt files of every form, for training and for benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.base.prompts import each_prompt, read_prompts, token_ids


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answer_files_give_their_prompts_as_they_are(tmp_path: Path) -> None:
    file = lines(tmp_path / "answers.jsonl", {"source": "s", "prompt_ids": [5, 6]}, {"prompt": "hi"})
    first, second = read_prompts([file], allow_ids=True)
    assert (first.source, token_ids(first, None)) == ("s", [5, 6])
    assert second.ids is None
    with pytest.raises(UserError, match="line 1: needs one of prompt, messages or turns") as caught:
        read_prompts([file])
    one_sentence(caught.value)


@pytest.mark.parametrize("ids", [[], [1, -1], [1.5], "12", [True]])
def test_ids_that_are_no_tokens_are_refused(ids: Any, tmp_path: Path) -> None:
    file = lines(tmp_path / "answers.jsonl", {"prompt_ids": ids})
    with pytest.raises(UserError, match="line 1: prompt_ids") as caught:
        read_prompts([file], allow_ids=True)
    one_sentence(caught.value)


def test_the_first_few_are_had_without_reading_on(tmp_path: Path) -> None:
    file = lines(tmp_path / "prompts.jsonl", {"prompt": "hi"}, {"bad": 1})
    assert next(each_prompt([file])).text == "hi"


def test_a_prompt_goes_through_the_chat_template_if_there_is_one(tmp_path: Path) -> None:
    class Tokenizer:
        chat_template: str | None = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

        def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> dict[str, list[int]]:
            if not messages[0]["content"].isascii():
                raise ValueError("not this one")
            return {"input_ids": [0, len(messages[0]["content"])]}

    tokenizer = Tokenizer()
    plain, refused = read_prompts([lines(tmp_path / "p.jsonl", {"prompt": "abc"}, {"prompt": "\u00e4"})])
    assert token_ids(plain, tokenizer) == [3]
    tokenizer.chat_template = "x"
    assert token_ids(plain, tokenizer) == [0, 3]
    with pytest.raises(UserError, match="line 2: the target's chat template refuses") as caught:
        token_ids(refused, tokenizer)
    one_sentence(caught.value)
