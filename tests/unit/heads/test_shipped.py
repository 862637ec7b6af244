"""The shipped head drafts as well as its model card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from length import length
from safetensors.torch import load_file

from clover_vllm.base.paths import shipped_head
from clover_vllm.eval.evaluate import Evaluator, best_first, greedy_answers
from clover_vllm.eval.report import Evaluation
from clover_vllm.heads.clover2.checkpoint import load_head
from clover_vllm.heads.weights import check_target
from clover_vllm.target.frozen import FrozenTarget

ANSWERS = length(5, 16)


@pytest.fixture(scope="module")
def target(smollm2: Path) -> FrozenTarget:
    return FrozenTarget(smollm2, torch.bfloat16)


@pytest.mark.slow
def test_tokens_per_step_are_those_of_the_model_card(target: FrozenTarget) -> None:
    """On the first answers of the card's own; 10% less is a regression, since they are few."""
    folder = shipped_head()
    head = load_head(folder)
    check_target(head.config, target.config, target.lm_head)
    answers = greedy_answers([folder / "held-out.jsonl.gz"], target, ANSWERS)
    evaluator = Evaluator(target, head)
    evaluator.check_answers(answers)
    growths = [best_first(8), best_first(25)]
    replays = [evaluator.replay(answer, growths) for answer in answers]
    card = {
        (row["head"], row["growth"]): row["tokens_per_step"]
        for row in json.loads((folder / "eval.json").read_text())["results"]
    }
    for column, growth in enumerate(growths):
        found = Evaluation("", growth.name, [row[column] for row in replays]).tokens_per_step
        promised = card[folder.name, growth.name]
        assert found > 0.9 * promised, f"{growth.name}: {found:.2f} tokens per step, card says {promised:.2f}"


def test_shipped_files_are_complete_and_small() -> None:
    folder = shipped_head()
    card = (folder / "README.md").read_text()
    for named in ("Licence", "gsm8k_train", "clover-vllm train", "tree of 25", "torch"):
        assert named in card
    for name in ("training.png", "eval.png", "eval.json", "log.json", "ablations.png"):
        assert (folder / name).stat().st_size > 100
    tensors = load_file(folder / "model.safetensors")
    assert all(t.dtype == torch.bfloat16 for n, t in tensors.items() if n != "draft_vocab")
    assert sum(p.stat().st_size for p in folder.iterdir()) < 25 * 2**20


def test_the_card_says_what_the_evaluation_found() -> None:
    folder = shipped_head()
    card = (folder / "README.md").read_text()
    results = json.loads((folder / "eval.json").read_text())["results"]
    assert (folder.name, "tree of 8") in [(found["head"], found["growth"]) for found in results]
    for found in results:
        assert f"{found['tokens_per_step']:.2f} ± {found['standard_error']:.2f}" in card
        if found["head"] == folder.name:
            shares = " ".join(f"{100 * share:.0f}%" for share in found["acceptance_by_depth"])
            assert f"| {found['growth']} |" in card
            assert f"| {shares} |" in card
            if found["growth"] == "tree of 8":
                for source, tokens in found["by_category"].items():
                    assert f"| {source} | {tokens:.2f} |" in card


def test_eagle1_baseline_is_shipped_beside_it() -> None:
    folder = shipped_head().with_name("smollm2-135m-eagle1")
    assert "fc.weight" in load_file(folder / "model.safetensors")
    assert (folder / "model.safetensors").stat().st_size < 20 * 2**20
    assert (folder / "log.json").stat().st_size > 100
