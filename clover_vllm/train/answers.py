"""Answers of a target: JSON lines of token ids, as `clover-vllm data` writes them.

One line per answer: `source` (text), `temperature` (number), `prompt_ids` and `answer_ids` (lists
of token ids), `finish` (`stop` or `length`). Files may be gzipped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import expand, open_text
from clover_vllm.base.paths import home

if TYPE_CHECKING:
    from datasets import Dataset

_FIELDS = ("source", "temperature", "prompt_ids", "answer_ids", "finish")


@dataclass
class AnswerSet:
    """Answers to train on, kept in Arrow files on disk, not in memory."""

    rows: Dataset
    prompt_lengths: list[int]
    answer_lengths: list[int]
    dropped: int  # answers left out because their prompt leaves no room or they have one token only
    max_length: int

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> list[int]:
        """Tokens per sequence, prompt and answer."""
        return [p + a for p, a in zip(self.prompt_lengths, self.answer_lengths, strict=True)]

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt ids and answer ids of one sequence, int64; the answer cut at `max_length`."""
        row = self.rows[index]
        prompt = np.asarray(row["prompt_ids"], dtype=np.int64)
        answer = np.asarray(row["answer_ids"], dtype=np.int64)
        return prompt, answer[: self.answer_lengths[index]]

    def token_counts(self, vocab_size: int) -> torch.Tensor:
        """How often each token id occurs in the answers, int64 [V]."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for batch in self.rows.with_format("arrow").iter(batch_size=4096):
            ids = batch["answer_ids"].combine_chunks().flatten().to_numpy()
            counts += np.bincount(ids, minlength=vocab_size)
        return torch.from_numpy(counts)

    def source_counts(self, without: Collection[int] = ()) -> Counter[str]:
        """Answers per source, but for some."""
        sources = list(self.rows["source"])
        return Counter(sources) - Counter(sources[i] for i in without)


def read_answers(
    paths: Sequence[Path],
    vocab_size: int,
    max_length: int,
    limit_tokens: int | None = None,
    leave_out: Collection[str] = (),
) -> AnswerSet:
    """Read answer files.

    Args:
        paths: files, or folders of them.
        vocab_size: token ids must be below it.
        max_length: longest sequence; longer answers are cut.
        limit_tokens: stop after this many answer tokens (for ablations).
        leave_out: sources whose answers are not read.

    Raises:
        UserError: a file is missing or malformed (names the line), holds ids that the target does
            not have, no answer is of a source to leave out, or nothing is left.
    """
    files = [file for file in expand(paths) if _looks_right(file)]
    if not files:
        raise UserError(f"{paths[0]} holds no usable answer.")
    from datasets import Features, Value, load_dataset
    from datasets import List as ListOf
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.logging import CRITICAL, disable_progress_bar, set_verbosity

    kinds = [
        Value("string"),
        Value("float32"),
        ListOf(Value("int32")),
        ListOf(Value("int32")),
        Value("string"),
    ]
    disable_progress_bar()
    set_verbosity(CRITICAL)  # it logs tracebacks of files that we name ourselves
    try:
        rows = load_dataset(
            "json",
            data_files=[str(f) for f in files],
            features=Features(dict(zip(_FIELDS, kinds, strict=True))),
            split="train",
            cache_dir=str(home() / "datasets"),
        )
    except DatasetGenerationError as error:
        for file in files:
            _find_bad_line(file)
        raise UserError(f"{files[0]} and its neighbours cannot be read ({error.__cause__}).") from error
    rows = _without(rows, leave_out)
    prompts, answers = _lengths(rows, "prompt_ids"), _lengths(rows, "answer_ids")
    usable = np.nonzero((prompts >= 1) & (answers >= 2) & (prompts + 2 <= max_length))[0]
    dropped = len(rows) - len(usable)
    if limit_tokens is not None:
        usable = usable[: 1 + int(np.searchsorted(np.cumsum(answers[usable]), limit_tokens))]
    if not len(usable):
        raise UserError(
            f"{paths[0]} holds no usable answer (each has fewer than 2 tokens, or its prompt leaves no "
            f"room within {max_length} tokens)."
        )
    if len(usable) < len(rows):
        rows = rows.select(usable.tolist())
    _check_ids(rows, vocab_size)
    prompts, answers = prompts[usable], answers[usable]
    answers = np.minimum(answers, max_length - prompts)
    return AnswerSet(rows, prompts.tolist(), answers.tolist(), dropped, max_length)


def _without(rows: Dataset, sources: Collection[str]) -> Dataset:
    """All answers but those of some sources.

    Raises:
        UserError: there is none of such a source.
    """
    if not sources:
        return rows
    of = list(rows["source"])
    if unknown := sorted(set(sources) - set(of)):
        raise UserError(
            f"No answer is of the source {unknown[0]!r}, which is to be left out; there are {', '.join(sorted(set(of)))}."
        )
    return rows.select([i for i, source in enumerate(of) if source not in sources])


def _lengths(rows: Dataset, column: str) -> np.ndarray:
    import pyarrow.compute as pc

    parts = [
        pc.list_value_length(batch[column].combine_chunks()).fill_null(0).to_numpy(zero_copy_only=False)
        for batch in rows.with_format("arrow").iter(batch_size=8192)
    ]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def _check_ids(rows: Dataset, vocab_size: int) -> None:
    for batch in rows.with_format("arrow").iter(batch_size=8192):
        for column in ("prompt_ids", "answer_ids"):
            values = batch[column].combine_chunks().flatten()
            if values.null_count:
                raise UserError("The answers hold a null where a token id should be.")
            ids = values.to_numpy(zero_copy_only=False)
            if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
                raise UserError(
                    f"The answers hold token ids outside 0..{vocab_size - 1}; they were made with "
                    "another target's tokenizer."
                )


def _looks_right(file: Path) -> bool:
    """Check the first line, since missing columns read as nulls; False when there is no line."""
    for number, line in enumerate(open_text(file), 1):
        if line.strip():
            problem = _line_problem(line)
            if problem:
                raise UserError(f"{file}, line {number}: {problem}.")
            return True
    return False


def _find_bad_line(file: Path) -> None:
    for number, line in enumerate(open_text(file), 1):
        if not line.strip():
            continue
        problem = _line_problem(line)
        if problem:
            raise UserError(f"{file}, line {number}: {problem}.")


def _line_problem(line: str) -> str | None:
    try:
        row: Any = json.loads(line)
    except ValueError:
        return "not JSON"
    if not isinstance(row, dict):
        return "not a JSON object"
    for name in ("prompt_ids", "answer_ids"):
        ids = row.get(name)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            return f"{name} must be a list of token ids"
    if row.keys() != set(_FIELDS):
        return f"fields must be {', '.join(_FIELDS)}"
    return None
