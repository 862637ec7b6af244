"""Training learns, resumes exactly after kills, and refuses bad input."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Script
from length import length
from safetensors.torch import load_file
from small import VOCAB, one_sentence, tiny_llama
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2.checkpoint import load_head
from clover_vllm.heads.eagle1.checkpoint import load_eagle1
from clover_vllm.heads.registry import kind_of
from clover_vllm.train.answers import read_answers
from clover_vllm.train.settings import TrainSettings
from clover_vllm.train.trainer import train, whole_checkpoint


def settings(target: Path, answers: Path, output: Path, **changes: Any) -> TrainSettings:
    fields: dict[str, Any] = {
        "batch_tokens": 64,
        "epochs": 2.0,
        "save_every": 2,
        "log_every": 1,
        "learning_rate": 3e-3,
        "dtype": "float32",
    }
    return TrainSettings(target=str(target), data=[answers], output=output, **(fields | changes))


def losses(output: Path) -> list[float]:
    return [r["loss"] for r in json.loads((output / "log.json").read_text()) if "loss" in r]


def validations(output: Path) -> list[dict[str, Any]]:
    return [r for r in json.loads((output / "log.json").read_text()) if "eval_loss" in r]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss_and_writes_everything(
    optimizer: str, tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    summary = train(settings(tiny_target, tiny_answers, tmp_path / "run", epochs=6.0, optimizer=optimizer))
    curve = losses(tmp_path / "run")
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    assert summary["answer_token_visits"] >= 6 * summary["answer_tokens"]
    assert summary["peak_memory_gib"] > 0
    assert (tmp_path / "run" / "head" / "training.png").stat().st_size > 1000
    card = (tmp_path / "run" / "head" / "README.md").read_text()
    assert "answer tokens" in card
    assert "kind0" in card
    row = json.loads((tmp_path / "run" / "log.json").read_text())[0]
    assert len(row["accuracy"]) == 5
    head = load_head(tmp_path / "run" / "head")
    assert head.config.target == "target"
    assert head.config.hidden_scale != 1.0


@pytest.mark.slow
def test_the_loss_of_answers_set_aside_is_measured_at_each_checkpoint_and_told_to_trackers(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "events"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(events))
    changes: dict[str, Any] = {"epochs": 3.0, "save_every": 4}
    summary = train(
        settings(tiny_target, tiny_answers, tmp_path / "run", trackers=["tensorboard"], **changes)
    )
    assert summary["answers_set_aside"] == 3
    assert summary["answers"] == 57
    validated = validations(tmp_path / "run")
    steps = summary["steps"]
    assert [entry["step"] for entry in validated] == sorted({*range(4, steps + 1, 4), steps})
    assert validated[-1]["eval_loss"] < validated[0]["eval_loss"]
    assert set(validated[0]) == {"eval_loss", "step", "eval_accuracy", "eval_vocabulary", "eval_regression"}
    assert summary["validation_loss"] == round(validated[-1]["eval_loss"], 5)
    told = EventAccumulator(str(events)).Reload()
    assert [event.value for event in told.Scalars("eval/accuracy_1")] == pytest.approx(
        [entry["eval_accuracy"][0] for entry in validated]
    )
    assert len(told.Scalars("train/loss")) == steps

    train(settings(tiny_target, tiny_answers, tmp_path / "none", validation=0, **changes))
    assert not validations(tmp_path / "none")
    with pytest.raises(UserError, match="--trackers nowhere is not installed") as caught:
        train(settings(tiny_target, tiny_answers, tmp_path / "two", trackers=["nowhere"]))
    one_sentence(caught.value)


def test_eagle1_trains_and_is_saved_as_vllm_expects(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    train(settings(tiny_target, tiny_answers, tmp_path / "run", method="eagle1"))
    curve = losses(tmp_path / "run")
    assert curve[-1] < curve[0]
    folder = tmp_path / "run" / "head"
    tensors = load_file(folder / "model.safetensors")
    assert "fc.weight" in tensors
    assert "layers.0.self_attn.q_proj.weight" in tensors
    assert not [n for n in tensors if "input_layernorm" in n or "embed" in n or "lm_head" in n]
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert config["architectures"] == ["LlamaForCausalLM"]
    load_eagle1(folder)


@pytest.mark.parametrize("method", ["clover1", "medusa"])
def test_earlier_methods_train_towards_the_tokens_of_the_text(
    method: str, tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    """Their published loss, decay included, lowers; the head is found by its config."""
    summary = train(settings(tiny_target, tiny_answers, tmp_path / "run", method=method, epochs=4.0))
    curve = losses(tmp_path / "run")
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    weights = summary["settings"]["weights"]
    assert (weights["regression"], weights["of_tokens"]) == (0.0, True)
    assert weights["decay"] == (0.8 if method == "medusa" else 0.7)
    assert kind_of(tmp_path / "run" / "head").method == method


@pytest.mark.slow
def test_cached_hidden_states_change_nothing(tiny_target: Path, tiny_answers: Path, tmp_path: Path) -> None:
    train(settings(tiny_target, tiny_answers, tmp_path / "fly"))
    for name, gib in (("whole", 1.0), ("part", 300 * 128 * 4 / 2**30)):
        train(
            settings(tiny_target, tiny_answers, tmp_path / name, cache_gib=gib, cache=tmp_path / f"c-{name}")
        )
        # A second epoch pads other sequences beside these, hence not to the last bit.
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "fly"), rel=1e-4)
    assert (tmp_path / "c-part" / "states.bin").stat().st_size <= 300 * 128 * 4


def test_draft_vocabulary_is_the_most_frequent_tokens(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    train(settings(tiny_target, tiny_answers, tmp_path / "run", draft_vocab=20, epochs=1.0))
    counts = torch.zeros(211, dtype=torch.int64)
    for line in tiny_answers.read_text().splitlines():
        for token in json.loads(line)["answer_ids"]:
            counts[token] += 1
    vocab = load_head(tmp_path / "run" / "head").draft_vocab
    assert vocab is not None
    assert len(vocab) == 20
    left_out = counts.clone()
    left_out[vocab] = -1
    assert int(counts[vocab].min()) >= int(left_out.max())


def _steps(output: Path) -> int:
    """Steps of the newest whole checkpoint."""
    return max((int(p.parent.name.split("-")[1]) for p in output.glob("checkpoint-*/complete")), default=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_at_random_moments_leave_the_same_curve_and_head(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {
        "target": str(tiny_target),
        "data": [str(tiny_answers)],
        "batch_tokens": 16,
        "epochs": float(length(3, 5)),
        "save_every": 4,
        "log_every": 2,
        "cache_gib": 1.0,
        "dtype": "bfloat16",
        "optimizer": "muon",
    }
    whole = arguments | {"output": str(tmp_path / "whole"), "cache": str(tmp_path / "c1")}
    with Script("run_train", whole, anew=True) as script:
        script.answer()
    total = json.loads((tmp_path / "whole" / "summary.json").read_text())["steps"]
    broken = arguments | {"output": str(tmp_path / "broken"), "cache": str(tmp_path / "c2")}
    rng = random.Random(7)
    kills = length(1, 10)
    startup = 0.0
    for kill in range(kills):
        done, started = _steps(tmp_path / "broken"), time.monotonic()
        with Script("run_train", broken) as script:
            if kill % 2:  # from its start to the first step, should this start be a quick one
                latest = started + rng.uniform(0.05, 0.9) * startup
                while (
                    time.monotonic() < latest and not script.ended() and _steps(tmp_path / "broken") <= done
                ):
                    time.sleep(0.002)
            else:  # between steps, or while a checkpoint is written
                wanted = (kill + 1) * total // (kills + 2)
                while not script.ended() and _steps(tmp_path / "broken") < wanted:
                    time.sleep(0.002)
                startup = startup or time.monotonic() - started
                time.sleep(rng.uniform(0.0, 0.05))
            assert not script.ended(), f"the run ended before it could be killed\n{script.log()}"
            script.kill()
    assert 0 < _steps(tmp_path / "broken") < total
    with Script("run_train", broken) as script:
        script.answer()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert validations(tmp_path / "broken") == validations(tmp_path / "whole") != []
    one = load_file(tmp_path / "whole" / "head" / "model.safetensors")
    two = load_file(tmp_path / "broken" / "head" / "model.safetensors")
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


TWO_RANKS = ["--batch-tokens", "32", "--log-every", "1", "--save-every", "5", "--dtype", "float32"]


def _train_two(target: Path, answers: Path, output: Path, *more: str) -> list[str]:
    """What to ask of `clover-vllm` on each of two ranks."""
    given = ["--target", str(target), "--data", str(answers), "--output", str(output)]
    return ["train", *given, *TWO_RANKS, *more]


@contextmanager
def _two_ranks(spec: dict[str, Any]) -> Iterator[list[Script]]:
    """`run_rank` on two ranks, at work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:
        own = ({"RANK": rank, "LOCAL_RANK": rank} for rank in "01")
        yield [stack.enter_context(Script("run_rank", spec, together | one)) for one in own]


@pytest.fixture(scope="module")
def muon_by_two(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_answers: Path) -> Path:
    output = tmp_path_factory.mktemp("muon") / "two"
    arguments = _train_two(tiny_target, tiny_answers, output, "--epochs", "2", "--optimizer", "muon")
    with _two_ranks({"arguments": arguments}) as ranks:
        for rank in ranks:
            rank.answer()
    return output


def _equals_accumulation(two: Path, one: Path, target: Path, answers: Path, **more: Any) -> None:
    """Two ranks trained as one process with twice the steps between updates."""
    changes = {"batch_tokens": 32, "accumulate": 2, "learning_rate": 1e-3, "save_every": 5} | more
    train(settings(target, answers, one, **changes))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    for seen, expected in zip(
        validations(two), validations(one), strict=True
    ):  # batches that two ranks cannot share evenly
        assert seen["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)
        assert seen["eval_accuracy"] == pytest.approx(expected["eval_accuracy"], abs=0.02)
    alone, together = (load_head(folder / "head").state_dict() for folder in (one, two))
    for name, tensor in alone.items():  # bfloat16 in the file
        torch.testing.assert_close(together[name], tensor, atol=1e-3, rtol=1e-2)
    summary = json.loads((two / "summary.json").read_text())
    assert summary["answer_token_visits"] >= 0.9 * more["epochs"] * summary["answer_tokens"]


@pytest.mark.slow
def test_two_processes_of_torchrun_train_as_one_with_accumulation(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    """As users start them; `threads.N` says what rank N leaves running."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--local-addr", "127.0.0.1"]
    script = Path(__file__).parents[2] / "support" / "run_cli.py"
    arguments = _train_two(tiny_target, tiny_answers, tmp_path / "two", "--epochs", "1")
    command = [*launch, str(script), str(tmp_path / "threads"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):  # a thread that outlives Python may abort its process, and torchrun the others
        names = json.loads((tmp_path / f"threads.{rank}").read_text())
        assert names
        assert not any("gloo" in name for name in names), names
    _equals_accumulation(tmp_path / "two", tmp_path / "one", tiny_target, tiny_answers, epochs=1.0)


@pytest.mark.slow
def test_two_processes_train_as_one_with_muon(
    muon_by_two: Path, tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    _equals_accumulation(
        muon_by_two, tmp_path / "one", tiny_target, tiny_answers, epochs=2.0, optimizer="muon"
    )


@pytest.mark.slow
def test_two_ranks_resume_as_if_never_killed(
    muon_by_two: Path, tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    output = tmp_path / "broken"
    arguments = _train_two(tiny_target, tiny_answers, output, "--epochs", "2", "--optimizer", "muon")
    with _two_ranks({"arguments": arguments}) as ranks:
        while not ranks[0].ended() and not _steps(output):
            time.sleep(0.002)
        assert not ranks[0].ended(), f"the run ended before it could be killed\n{ranks[0].log()}"
        for rank in ranks:
            rank.kill()
    checkpoint = whole_checkpoint(output)
    assert checkpoint is not None
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}

    with _two_ranks({"arguments": arguments}) as ranks:
        for rank in ranks:
            rank.answer()
        assert f"Resuming from {checkpoint}" in ranks[0].log(None)
    assert losses(output) == losses(muon_by_two)
    assert validations(output) == validations(muon_by_two) != []
    never, again = (load_file(run / "head" / "model.safetensors") for run in (muon_by_two, output))
    for name, tensor in never.items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.slow
def test_ranks_agree_on_a_checkpoint_and_mark_it_when_all_have_written(tmp_path: Path) -> None:
    for rank, step in ((0, 8), (1, 4)):  # what two hosts see
        (tmp_path / f"host{rank}" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"host{rank}" / f"checkpoint-{step}" / "complete").touch()
    with _two_ranks({"agree": str(tmp_path)}) as ranks:
        for one in ranks:
            one.answer()
            assert "AGREED checkpoint-8\n" in one.log(None)
    assert (tmp_path / "checkpoint-12" / "complete").exists()


def test_only_the_newest_whole_checkpoint_is_kept_for_resuming(tmp_path: Path) -> None:
    """A kill may leave an older one half deleted, still marked as whole and last touched."""
    for step, files in ((4, ["complete"]), (8, ["complete", "trainer_state.json"]), (12, ["model.bin"])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in files:
            (tmp_path / f"checkpoint-{step}" / name).touch()
    assert whole_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    assert whole_checkpoint(tmp_path / "none") is None


def test_foreign_checkpoints_are_left_alone(tiny_target: Path, tiny_answers: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "run" / "checkpoint-500"
    foreign.mkdir(parents=True)
    with pytest.raises(UserError, match="another program") as caught:
        train(settings(tiny_target, tiny_answers, tmp_path / "run"))
    one_sentence(caught.value)
    assert foreign.exists()


def test_divergence_is_an_error_and_no_head_is_written(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="diverged") as caught:
        train(settings(tiny_target, tiny_answers, tmp_path / "run", regression_weight=1e39))
    one_sentence(caught.value)
    assert not (tmp_path / "run" / "head").exists()


def test_a_run_is_not_continued_with_other_settings(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    train(settings(tiny_target, tiny_answers, tmp_path / "run", epochs=0.2))
    with pytest.raises(UserError, match="learning_rate") as caught:
        train(settings(tiny_target, tiny_answers, tmp_path / "run", epochs=0.2, learning_rate=1e-4))
    one_sentence(caught.value)


def test_a_head_is_continued_by_its_own_method_only(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    train(settings(tiny_target, tiny_answers, tmp_path / "run", epochs=0.2))
    changes = {"init_from": tmp_path / "run" / "head", "epochs": 0.2}
    train(settings(tiny_target, tiny_answers, tmp_path / "more", **changes))
    for method, named in (
        ("eagle1", "no EAGLE-1 head"),
        ("medusa2", "known are clover2, clover1, medusa, eagle1"),
    ):
        with pytest.raises(UserError, match=named) as caught:
            train(settings(tiny_target, tiny_answers, tmp_path / "two", method=method, **changes))
        one_sentence(caught.value)


def test_what_a_method_or_target_has_no_use_for_is_refused(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "medusa", "target_temperature": 0.5}, "--target-temperature"),
        ({"target_layers": [0, 2]}, "--target-layers must be below 2"),
        ({"method": "medusa", "norm_state": True}, "--norm-state shapes Clover-2 heads, not Medusa heads"),
        ({"method": "clover1", "num_layers": 2}, "--num-layers shapes Clover-2 heads, not Clover heads"),
    ]
    for changes, named in cases:
        with pytest.raises(UserError, match=named) as caught:
            train(settings(tiny_target, tiny_answers, tmp_path / "run", **changes))
        one_sentence(caught.value)


def test_continuing_a_head_of_another_target_is_refused(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    train(settings(tiny_target, tiny_answers, tmp_path / "run", epochs=0.2))
    other = tiny_llama(tmp_path / "other", hidden=96)
    with pytest.raises(UserError, match="do not fit") as caught:
        train(settings(other, tiny_answers, tmp_path / "two", init_from=tmp_path / "run" / "head"))
    one_sentence(caught.value)


def test_answers_of_sources_that_are_left_out_are_not_read(tiny_answers: Path) -> None:
    every, some = (
        read_answers([tiny_answers], VOCAB, 64),
        read_answers([tiny_answers], VOCAB, 64, leave_out=["kind1", "kind2"]),
    )
    assert set(every.source_counts()) == {"kind0", "kind1", "kind2"}
    assert some.source_counts() == {"kind0": every.source_counts()["kind0"]}
    with pytest.raises(
        UserError, match="'kind9', which is to be left out; there are kind0, kind1, kind2"
    ) as caught:
        read_answers([tiny_answers], VOCAB, 64, leave_out=["kind9"])
    one_sentence(caught.value)
