"""The prompt sets that benchmarks measure with."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clover_vllm.base.errors import UserError
from clover_vllm.base.paths import shipped_head
from clover_vllm.bench.compare import DEVELOPMENT, Prompts, fitting_prompts, split_prompts
from clover_vllm.bench.prompts import PROMPT_SETS, prompt_set

COUNTS = {
    "families": {
        "maths": 44,
        "question-answering": 42,
        "retrieval": 42,
        "summarisation": 41,
        "translation": 42,
        "two-turn-chat": 42,
    },
    "text-heavy": {"code-editing": 53, "copy-editing": 28, "extraction": 36, "quotation": 36},
    "prompt-heavy": {"prompt-heavy": 99},
}
LONGEST = 1600
"""Tokens that leave room for an answer in a context of 2,048."""


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module", params=PROMPT_SETS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def rows(name: str) -> list[dict[str, Any]]:
    return rows_of(prompt_set(name))


@pytest.fixture(scope="module")
def prompts(name: str, smollm2: Path) -> Prompts:
    return fitting_prompts(prompt_set(name), 10_000, LONGEST, str(smollm2))


def test_tasks_are_as_many_as_the_readme_says(name: str, rows: list[dict[str, Any]]) -> None:
    counts = Counter(row["task"] for row in rows)
    assert counts == COUNTS[name]
    readme = prompt_set(name).with_name("README.md").read_text(encoding="utf-8")
    for task, count in counts.items():
        assert f"| {name} | {task} | {count} |" in readme


def test_prompts_all_fit_and_none_is_there_twice(rows: list[dict[str, Any]], prompts: Prompts) -> None:
    assert len(prompts) == len(rows)
    assert len({tuple(ids) for ids in prompts}) == len(prompts)


def test_figures_and_development_hold_every_task_in_proportion(name: str, rows: list[dict[str, Any]]) -> None:
    figures, development = split_prompts([[i] for i in range(len(rows))])
    for task, count in COUNTS[name].items():
        developing = sum(rows[i]["task"] == task for (i,) in development)
        assert abs(developing - count / DEVELOPMENT) < 1.5
        assert sum(rows[i]["task"] == task for (i,) in figures) == count - developing


def test_no_prompt_is_among_the_held_out_ones_of_the_shipped_head(prompts: Prompts) -> None:
    held_out = {tuple(row["prompt_ids"]) for row in rows_of(shipped_head() / "held-out.jsonl.gz")}
    assert len(held_out) > 200
    assert held_out.isdisjoint(map(tuple, prompts))


def test_messages_end_with_the_user(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == (["user", "assistant", "user"] if row["task"] == "two-turn-chat" else ["user"])
        assert all(message["content"].strip() for message in row["messages"])


def test_files_do_not_depend_on_when_they_were_written(name: str) -> None:
    data = prompt_set(name).read_bytes()
    assert len(data) < 300_000
    assert data[4:8] == bytes(4)  # time of gzip's header


def test_prompt_heavy_prompts_have_about_a_thousand_tokens(smollm2: Path) -> None:
    lengths = [len(ids) for ids in fitting_prompts(prompt_set("prompt-heavy"), 10_000, LONGEST, str(smollm2))]
    assert min(lengths) > 900
    assert max(lengths) < 1200


def test_retrieval_contexts_are_long(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "retrieval.jsonl"
    rows = [row for row in rows_of(prompt_set("families")) if row["task"] == "retrieval"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for ids in fitting_prompts(path, len(rows), LONGEST, str(smollm2)):
        assert 600 < len(ids) < 1500


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(UserError, match="families, text-heavy, prompt-heavy"):
        prompt_set("familys")
