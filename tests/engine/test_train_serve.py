"""Train, serve, accept: what training teaches is what the engine drafts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines import Json, run_engine, tokens_of
from pairs import llm, speculative
from small import write_answers

from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import save_head
from clover_vllm.target.frozen import FrozenTarget
from clover_vllm.train.settings import TrainSettings
from clover_vllm.train.trainer import train


@pytest.mark.engine
def test_a_trained_head_accepts_more_than_an_untrained_one(
    tiny_target: Path, frozen: FrozenTarget, fitting_head: Clover2DraftModel, tmp_path: Path
) -> None:
    """A random target has no habits to learn, so both draft along the answers that were trained on."""
    data = write_answers(tmp_path / "answers.jsonl", frozen, 80)
    train(
        TrainSettings(
            target=str(tiny_target),
            data=[data],
            output=tmp_path / "run",
            batch_tokens=256,
            epochs=30.0,
            learning_rate=3e-3,
            dtype="float32",
        )
    )
    save_head(fitting_head, tmp_path / "untrained")
    answers = [json.loads(line) for line in data.read_text().splitlines()]
    requests = [
        {
            "prompt": answer["prompt_ids"],
            "params": {"temperature": 0.0, "max_tokens": len(answer["answer_ids"]), "ignore_eos": True},
        }
        for answer in answers
    ]
    stats: dict[str, Json] = {}
    for name, head in (("untrained", tmp_path / "untrained"), ("trained", tmp_path / "run" / "head")):
        run = run_engine(llm(tiny_target, speculative_config=speculative(head)), requests)
        assert tokens_of(run) == [[answer["answer_ids"]] for answer in answers]
        stats[name] = run["stats"]
    print(stats)
    assert stats["trained"]["verified"]["branching"] > 0
    assert stats["trained"]["accepted"] > 3 * stats["untrained"]["accepted"]
    assert stats["trained"]["steps"] < stats["untrained"]["steps"]
