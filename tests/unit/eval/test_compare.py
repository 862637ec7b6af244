"""Methods are trained, tuned and measured alike, and what comes of it is one file with a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import one_sentence, write_answers

from clover_vllm.base.errors import UserError
from clover_vllm.bench.plots import digest, source_of
from clover_vllm.eval.compare import ALL, Measured, Tried, compare, rows
from clover_vllm.eval.evaluate import Replay
from clover_vllm.eval.render import rendered
from clover_vllm.eval.settings import CompareSettings
from clover_vllm.target.frozen import FrozenTarget


@pytest.fixture(scope="module")
def settings(
    tiny_target: Path, tiny_answers: Path, frozen: FrozenTarget, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compare")
    return {
        "target": str(tiny_target),
        "data": [tiny_answers],
        "development": [write_answers(folder / "development.jsonl", frozen, 6, seed=11)],
        "answers": [write_answers(folder / "answers.jsonl", frozen, 9, seed=12)],
        "output": folder / "results",
        "work": folder / "work",
        "methods": ["medusa", "clover1", "eagle1"],
        "epochs": 1.0,
        "tuning_epochs": 0.3,
        "learning_rates": [1e-4, 3e-3],
        "batch_tokens": [128],
        "draft_vocab": 60,
        "num_heads": 3,
        "nodes": [4],
        "seeds": 2,
        "dtype": "float32",
    }


@pytest.mark.slow
def test_a_comparison_is_one_file_a_table_and_a_picture(settings: dict[str, Any]) -> None:
    file = compare(CompareSettings(**settings))
    found = json.loads(file.read_text())
    assert [m["method"] for m in found["methods"]] == settings["methods"]
    assert len({m["answer_token_visits"] for m in found["methods"]}) == 1
    for method in found["methods"]:
        best = max(method["tried"], key=lambda tried: tried["tokens_per_step"])
        assert method["chosen"] == best
        assert len(method["tried"]) == 2
    places = {(r["growth"], r["family"]) for r in found["results"]}
    kinds = [ALL, "kind0", "kind1", "kind2"]
    assert places == {(g, k) for g in ("chain of 5", "tree of 4", "published 25") for k in kinds}
    for row in found["results"]:
        low, high = row["tokens_per_step_interval"]
        assert 1.0 <= low <= row["tokens_per_step"] <= high
        if row["method"] == "medusa":
            assert (row["ratio"], row["ratio_interval"]) == (1.0, [1.0, 1.0])
    page = rendered("<!-- generated: compare -->\n<!-- /generated -->\n", file.parent)
    assert "| tree of 4 | all | 1." in page
    assert "Medusa: 0.0 M parameters" in page
    assert source_of(file.with_suffix(".png")) == digest(file)

    heads = {path: path.stat().st_mtime_ns for path in settings["work"].glob("*/head/model.safetensors")}
    assert len(heads) == 3 * (2 + 2)
    compare(CompareSettings(**settings))  # goes on from what is there
    assert {path: path.stat().st_mtime_ns for path in heads} == heads
    with pytest.raises(UserError, match="num_heads") as caught:
        compare(CompareSettings(**settings | {"num_heads": 2}))
    one_sentence(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"methods": ["clover2", "lookahead"]}, "lookahead"),
        ({"methods": ["clover2", "clover2"]}, "each once"),
        ({"nodes": [0]}, "--nodes"),
        ({"seeds": 0}, "--seeds"),
        ({"learning_rates": []}, "--learning-rates"),
    ],
)
def test_impossible_comparisons_are_refused(
    changes: dict[str, Any], named: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=named) as caught:
        compare(CompareSettings(**settings | changes))
    one_sentence(caught.value)


def test_answers_serve_one_purpose_only(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--answers and --development") as caught:
        compare(CompareSettings(**settings | {"answers": settings["development"]}))
    one_sentence(caught.value)


def test_intervals_pair_the_answers_of_two_methods() -> None:
    """Answers differ much, methods by the same tenth in each: the ratio is far surer than either figure."""
    lengths = [10, 40, 90, 20, 70, 30]
    slow = [
        Replay("kind", n, n // 2, []) if i % 2 else Replay("kind", n, n, []) for i, n in enumerate(lengths)
    ]
    fast = [Replay("kind", r.tokens * 11, r.steps * 10, []) for r in slow]
    tried = Tried(1e-3, 64)
    measured = [
        Measured(method, [tried], tried, 1, 1, {"chain of 5": [replays, replays]})
        for method, replays in (("clover1", slow), ("clover2", fast))
    ]
    row = next(r for r in rows(measured) if (r["method"], r["family"]) == ("clover2", ALL))
    low, high = row["tokens_per_step_interval"]
    assert high - low > 0.3
    assert row["ratio"] == pytest.approx(1.1)
    assert row["ratio_interval"] == pytest.approx([1.1, 1.1])
