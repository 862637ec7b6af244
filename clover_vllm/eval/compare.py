"""`clover-vllm compare`: methods of drafting side by side, trained and tuned alike.

Every method gets the same answers, the same draft vocabulary, the same number of visits to answer tokens, and the same
tries: each pair of learning rate and batch is trained for the same visits and judged on a development split. The pair
that accepts most tokens per step there is trained in full, once per seed, and measured on other answers. What differs
is the method: its model, its first weights and its published loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import check_same_settings, files_key, make_folder, write_json
from clover_vllm.base.progress import each
from clover_vllm.base.provenance import provenance
from clover_vllm.eval.comparison_plot import plot_compare
from clover_vllm.eval.evaluate import (
    Answer,
    Evaluator,
    Growth,
    Replay,
    best_first,
    greedy_answers,
    load_any_head,
)
from clover_vllm.eval.settings import CompareSettings
from clover_vllm.heads.registry import head_kind
from clover_vllm.target.frozen import FrozenTarget
from clover_vllm.train.answers import read_answers
from clover_vllm.train.settings import TrainSettings
from clover_vllm.train.trainer import choose_draft_vocab, train
from clover_vllm.tree import PUBLISHED_25, chain, grow_fixed

RESAMPLES = 2000
ALL = "all"
"""Name of the families together."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Tried:
    """A learning rate and a batch, and what they gave on the development split."""

    learning_rate: float
    batch_tokens: int
    tokens_per_step: float | None = None  # None: there was no other to choose from


@dataclass
class Measured:
    """What a method's heads did on the answers."""

    method: str
    tried: list[Tried]
    chosen: Tried
    parameters: int
    visits: int
    replays: dict[str, list[list[Replay]]]  # by growth, by seed, by answer


def compare(settings: CompareSettings) -> Path:
    """Train, tune, measure, and write the results with a plot beside them. Goes on where it was stopped.

    Returns:
        the JSON file.

    Raises:
        UserError: anything that the user can mend, before training starts where possible.
    """
    settings.check()
    made = provenance()
    file = settings.output if settings.output.suffix == ".json" else settings.output / "compare.json"
    make_folder(file.parent)
    make_folder(settings.work)
    target = FrozenTarget(settings.target, getattr(torch, settings.dtype), _device())
    answers = greedy_answers(settings.answers, target, settings.limit)
    development = greedy_answers(settings.development, target, settings.limit)
    _refuse_shared_answers(settings)
    check_same_settings(settings.work / "compare.json", _identity(settings, target))
    judge = _Judge(target, settings)
    found = [_measure(settings, method, judge, development, answers) for method in settings.methods]
    write_json(
        file,
        {
            "provenance": made,
            "seeds": settings.seeds,
            "answers": len(answers),
            "methods": [_as_json(m) for m in found],
            "results": rows(found),
        },
    )
    plot_compare(file, file.with_suffix(".png"))
    return file


def _measure(
    settings: CompareSettings,
    method: str,
    judge: _Judge,
    development: Sequence[Answer],
    answers: Sequence[Answer],
) -> Measured:
    """Choose learning rate and batch of a method, train it with them, and replay the answers."""
    tried = [Tried(*pair) for pair in product(settings.learning_rates, settings.batch_tokens)]
    if len(tried) > 1:
        folders = [_tuned(settings, method, one) for one in tried]
        tried = [
            replace(one, tokens_per_step=judge.tokens_per_step(folder, development))
            for one, folder in zip(tried, folders, strict=True)
        ]
    chosen = max(tried, key=lambda one: one.tokens_per_step or 0.0)
    folders = [_trained(settings, method, chosen, seed) for seed in range(settings.seeds)]
    by_seed = [judge.replays(folder, answers, judge.growths) for folder in folders]
    return Measured(
        method,
        tried,
        chosen,
        parameters=sum(p.numel() for p in load_any_head(folders[0] / "head").parameters()),
        visits=json.loads((folders[0] / "summary.json").read_text())["answer_token_visits"],
        replays={growth.name: [own[i] for own in by_seed] for i, growth in enumerate(judge.growths)},
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _identity(settings: CompareSettings, target: FrozenTarget) -> dict[str, Any]:
    """What the heads in the work folder depend on."""
    kept = ("epochs", "tuning_epochs", "draft_vocab", "num_heads", "optimizer", "max_length", "dtype")
    return {name: getattr(settings, name) for name in kept} | {
        "target": target.fingerprint(),
        "data": files_key(settings.data),
    }


def _refuse_shared_answers(settings: CompareSettings) -> None:
    """
    Raises:
        UserError: a file serves two of training, choosing and measuring.
    """
    used: dict[str, str] = {}
    for name in ("data", "development", "answers"):
        key = files_key(getattr(settings, name))
        if key in used:
            raise UserError(f"--{name} and --{used[key]} are the same answers; each needs its own.")
        used[key] = name


def _tuned(settings: CompareSettings, method: str, tried: Tried) -> Path:
    name = f"{method}-{tried.learning_rate:g}-{tried.batch_tokens}-tuning"
    return _run(settings, method, tried, settings.work / name, settings.tuning_epochs, 0)


def _trained(settings: CompareSettings, method: str, chosen: Tried, seed: int) -> Path:
    name = f"{method}-{chosen.learning_rate:g}-{chosen.batch_tokens}-seed{seed}"
    return _run(settings, method, chosen, settings.work / name, settings.epochs, seed)


def _run(
    settings: CompareSettings, method: str, tried: Tried, folder: Path, epochs: float, seed: int
) -> Path:
    """Train a head, unless that has been done already."""
    if not (folder / "summary.json").exists():
        train(
            TrainSettings(
                target=settings.target,
                data=settings.data,
                output=folder,
                method=method,
                epochs=epochs,
                batch_tokens=tried.batch_tokens,
                optimizer=settings.optimizer,
                learning_rate=tried.learning_rate,
                draft_vocab=settings.draft_vocab,
                num_heads=settings.num_heads,
                max_length=settings.max_length,
                cache_gib=settings.cache_gib,
                seed=seed,
                dtype=settings.dtype,
            )
        )
    return folder


class _Judge:
    """Replays answers with trained heads; all draft from one vocabulary."""

    def __init__(self, target: FrozenTarget, settings: CompareSettings) -> None:
        self.growths = [
            Growth("chain of 5", lambda drafter: grow_fixed(drafter, chain(5))),
            *(best_first(n) for n in settings.nodes),
            Growth("published 25", lambda drafter: grow_fixed(drafter, PUBLISHED_25)),
        ]
        self._deciding = best_first(settings.nodes[0])
        self._target = target
        self._vocab = None
        if settings.draft_vocab is not None:
            size = int(target.config.vocab_size)
            counts = read_answers(settings.data, size, settings.max_length).token_counts(size)
            self._vocab = choose_draft_vocab(counts, settings.draft_vocab)

    def replays(
        self, folder: Path, answers: Sequence[Answer], growths: Sequence[Growth]
    ) -> list[list[Replay]]:
        """By growth, those of all answers, with the head of a run."""
        evaluator = Evaluator(self._target, load_any_head(folder / "head"), self._vocab)
        evaluator.check_answers(answers)
        found = [evaluator.replay(answer, growths) for answer in each(answers, "answers", folder.name)]
        return [list(own) for own in zip(*found, strict=True)]

    def tokens_per_step(self, folder: Path, answers: Sequence[Answer]) -> float:
        """Of all answers together, with the tree that decides."""
        (replays,) = self.replays(folder, answers, [self._deciding])
        return sum(r.tokens for r in replays) / sum(r.steps for r in replays)


def _as_json(found: Measured) -> dict[str, Any]:
    return {
        "method": found.method,
        "title": head_kind(found.method).title,
        "parameters": found.parameters,
        "answer_token_visits": found.visits,
        "chosen": asdict(found.chosen),
        "tried": [asdict(t) for t in found.tried],
    }


def rows(found: Sequence[Measured]) -> list[Row]:
    """Tokens per step by method, tree and task family, with intervals.

    An interval comes from drawing answers with replacement, all seeds of an answer together. The same draws serve all
    methods, so `ratio` to the first method is compared answer by answer.
    """
    made: list[Row] = []
    for growth in found[0].replays:
        categories = [replay.category for replay in found[0].replays[growth][0]]
        for family in [ALL, *sorted(set(categories))]:
            chosen = np.array([i for i, category in enumerate(categories) if family in (ALL, category)])
            draws = np.random.default_rng(0).choice(chosen, (RESAMPLES, len(chosen)))
            base = _ratios(found[0].replays[growth], chosen, draws)
            for own in found:
                value, resampled = _ratios(own.replays[growth], chosen, draws)
                made.append(
                    {
                        "method": own.method,
                        "title": head_kind(own.method).title,
                        "growth": growth,
                        "family": family,
                        "answers": len(chosen),
                        "tokens_per_step": round(value, 4),
                        "tokens_per_step_interval": _interval(resampled),
                        "ratio": round(value / base[0], 4),
                        "ratio_interval": _interval(resampled / base[1]),
                    }
                )
    return made


def _ratios(
    seeds: Sequence[Sequence[Replay]], chosen: np.ndarray, draws: np.ndarray
) -> tuple[float, np.ndarray]:
    """Tokens over steps of the chosen answers, [1], and of every draw of them, [RESAMPLES]."""
    tokens = np.sum([[r.tokens for r in own] for own in seeds], axis=0)
    steps = np.sum([[r.steps for r in own] for own in seeds], axis=0)
    return float(tokens[chosen].sum() / steps[chosen].sum()), tokens[draws].sum(axis=1) / steps[draws].sum(
        axis=1
    )


def _interval(values: np.ndarray) -> list[float]:
    """95%, percentile."""
    return [round(float(x), 4) for x in np.percentile(values, [2.5, 97.5])]


def table(results: Sequence[Row]) -> Table:
    """Tokens per step of all families together."""
    out = Table(title="Tokens per step, bonus token included (greedy), 95% intervals", title_justify="left")
    methods = list(dict.fromkeys(row["title"] for row in results))
    out.add_column("tree", no_wrap=True)
    for title in methods:
        out.add_column(title, justify="right")
    for growth in dict.fromkeys(row["growth"] for row in results):
        own = {row["title"]: row for row in results if (row["growth"], row["family"]) == (growth, ALL)}
        out.add_row(growth, *(cell(own[title]) for title in methods))
    return out


def cell(row: Row) -> str:
    """`2.31 [2.20, 2.42]`"""
    low, high = row["tokens_per_step_interval"]
    return f"{row['tokens_per_step']:.2f} [{low:.2f}, {high:.2f}]"
