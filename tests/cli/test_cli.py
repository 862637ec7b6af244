"""The command line: help reads well, and every malformed input is one line and a non-zero exit."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published import published_folder
from safetensors.torch import load_file, save_file
from small import tiny_llama
from typer.testing import CliRunner, Result

from clover_vllm.cli import app
from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import save_head

COMMANDS = ["target", "batch", "data", "train", "eval", "convert", "bench", "torture", "trees", "demo"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


def refused(result: Result, named: str) -> None:
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1, result.output
    assert errors[0].endswith(".")
    assert named in errors[0]
    assert "Traceback" not in result.output


def test_help_lists_every_command_with_one_sentence() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    import typer

    click_command = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    assert click_command.help
    for parameter in click_command.params:
        assert getattr(parameter, "help", None), f"{command} {parameter.name} has no help"


def test_version() -> None:
    assert run("--version").output.startswith("clover-vllm ")


@pytest.fixture
def head_folder(fitting_head: Clover2DraftModel, tmp_path: Path) -> Path:
    save_head(fitting_head, tmp_path / "head")
    return tmp_path / "head"


def _text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


BAD_ANSWERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda _: None, "does not exist"),
    "empty": (_text(""), "no usable answer"),
    "not JSON": (_text("{\n"), "line 1"),
    "fields missing": (_text('{"prompt_ids": [1], "answer_ids": [1]}\n'), "fields must be"),
    "text for ids": (
        _text('{"source": "a", "temperature": 0, "prompt_ids": "x", "answer_ids": [1], "finish": "stop"}\n'),
        "prompt_ids",
    ),
    "foreign ids": (
        _text(
            '{"source": "a", "temperature": 0, "prompt_ids": [1], "answer_ids": [5000, 3, 4], "finish": "stop"}\n'
        ),
        "another target",
    ),
    "prompts longer than the context": (
        lambda p: p.write_text(
            json.dumps(
                {
                    "source": "a",
                    "temperature": 0,
                    "prompt_ids": [5] * 300,
                    "answer_ids": [5, 6, 7],
                    "finish": "stop",
                }
            )
            + "\n"
        ),
        "no usable answer",
    ),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_bad_answers_are_refused_by_train(kind: str, tiny_target: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    make, named = BAD_ANSWERS[kind]
    make(path)
    refused(run("train", "--target", tiny_target, "--data", path, "--output", tmp_path / "run"), named)


def test_truncated_gzip_is_refused(tiny_target: Path, tiny_answers: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl.gz"
    path.write_bytes(gzip.compress(tiny_answers.read_bytes())[:-40])
    refused(
        run("train", "--target", tiny_target, "--data", path, "--output", tmp_path / "run"),
        "cannot be read",
    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--save-every", "15"], "--save-every"),
        (["--epochs", "0"], "--epochs"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--optimizer", "sgd"], "--optimizer"),
        (["--schedule", "square"], "--schedule"),
        (["--dtype", "int8"], "--dtype"),
        (["--draft-vocab", "0"], "--draft-vocab"),
        (["--draft-vocab", "5000"], "--draft-vocab"),
        (["--num-heads", "0"], "num_heads"),
        (["--max-length", "2"], "no usable answer"),
        (["--init-from", "nowhere"], "does not exist"),
    ],
)
def test_impossible_training_options_are_refused(
    options: list[str], named: str, tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    result = run(
        "train", "--target", tiny_target, "--data", tiny_answers, "--output", tmp_path / "run", *options
    )
    refused(result, named)


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all"])
def test_missing_target_is_refused(name: str, tiny_answers: Path, head_folder: Path, tmp_path: Path) -> None:
    refused(run("train", "--target", name, "--data", tiny_answers, "--output", tmp_path / "run"), "Target")
    refused(run("eval", "--target", name, "--answers", tiny_answers, "--head", head_folder), "Target")


def test_target_with_truncated_weights_is_refused(
    tiny_answers: Path, head_folder: Path, tmp_path: Path
) -> None:
    folder = tiny_llama(tmp_path / "broken")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    refused(run("eval", "--target", folder, "--answers", tiny_answers, "--head", head_folder), "Target")


def test_target_that_is_no_llama_is_refused(tiny_answers: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=211)).save_pretrained(
        tmp_path / "g"
    )
    result = run("train", "--target", tmp_path / "g", "--data", tiny_answers, "--output", tmp_path / "run")
    refused(result, "Llama-like")


def test_eval_prints_a_table_and_writes_json_and_plot(
    tiny_target: Path, tiny_answers: Path, head_folder: Path, tmp_path: Path
) -> None:
    result = run(
        "eval", "--target", tiny_target, "--answers", tiny_answers, "--head", head_folder,
        "--output", tmp_path / "out", "--dtype", "float32", "--limit", "5", "--record",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "tokens/step" in result.output
    assert "kind0" in result.output
    assert "5 of 5 answers" in result.output  # progress, where output is no terminal
    rows = json.loads((tmp_path / "out" / "eval.json").read_text())["results"]
    assert [r["growth"] for r in rows][:2] == ["chain of 5", "tree of 4"]
    assert all(r["tokens_per_step"] >= 1 and r["answers"] == 5 for r in rows)
    assert (tmp_path / "out" / "eval.png").stat().st_size > 1000
    recorded = json.loads((head_folder / "config.json").read_text())["first_acceptance"]
    assert [recorded] == (rows[0]["acceptance_by_depth"] or [0.0])[:1]


def test_eval_refuses_a_head_of_another_target(tiny_answers: Path, head_folder: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", hidden=96)
    result = run("eval", "--target", other, "--answers", tiny_answers, "--head", head_folder)
    refused(result, "do not fit")


def test_eval_refuses_nan_weights(tiny_target: Path, tiny_answers: Path, head_folder: Path) -> None:
    tensors = load_file(head_folder / "model.safetensors")
    tensors["clover_norm.weight"][0] = float("nan")
    save_file(tensors, head_folder / "model.safetensors")
    result = run("eval", "--target", tiny_target, "--answers", tiny_answers, "--head", head_folder)
    refused(result, "not finite")


def test_eval_refuses_truncated_weights(tiny_target: Path, tiny_answers: Path, head_folder: Path) -> None:
    path = head_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    result = run("eval", "--target", tiny_target, "--answers", tiny_answers, "--head", head_folder)
    refused(result, "damaged")


@pytest.mark.parametrize(("option", "value"), [("--nodes", "0"), ("--dtype", "int8"), ("--limit", "0")])
def test_impossible_eval_options_are_refused(
    option: str, value: str, tiny_target: Path, tiny_answers: Path, head_folder: Path
) -> None:
    result = run(
        "eval", "--target", tiny_target, "--answers", tiny_answers, "--head", head_folder, option, value
    )
    refused(result, option)


def test_eval_refuses_answers_without_a_greedy_one(
    tiny_target: Path, tiny_answers: Path, head_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "warm.jsonl"
    path.write_text(tiny_answers.read_text().replace('"temperature": 0.0', '"temperature": 0.8'))
    result = run("eval", "--target", tiny_target, "--answers", path, "--head", head_folder)
    refused(result, "no greedy answer")


def test_convert_refuses_what_is_not_a_published_checkpoint(head_folder: Path, tmp_path: Path) -> None:
    refused(run("convert", tmp_path / "nowhere", tmp_path / "out"), "does not exist")
    refused(run("convert", head_folder, tmp_path / "out"), "already")
    (head_folder / "config.json").write_text('{"model_type": "llama"}')
    refused(run("convert", head_folder, tmp_path / "out"), "vocab_size")


def test_convert_lists_every_wrong_tensor(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "published", "single")
    tensors = load_file(source / "model.safetensors")
    del tensors["clover_head_mlp.bias"]
    tensors["clover_head_mlp2.weight"] = torch.zeros(64, 64)
    tensors["stranger"] = torch.zeros(1)
    save_file(tensors, source / "model.safetensors")
    result = run("convert", source, tmp_path / "out")
    for named in ("missing: clover_head_mlp.bias", "unexpected: stranger", "(64, 64), expected (64, 128)"):
        refused(result, named)
    assert not (tmp_path / "out").exists()


def test_unknown_target_name_lists_the_known(tmp_path: Path) -> None:
    refused(run("target", "gpt-9"), "smollm2-135m")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    refused(run("target", "smollm2-135m", "--output", tmp_path / "mine"), "not a target made by")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_data_refuses_bad_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": ""}\n')
    refused(run("data", "--target", "x", "--prompts", path, "--output", tmp_path / "o"), "empty")
    refused(
        run("data", "--target", "x", "--prompts", tmp_path / "none.jsonl", "--output", tmp_path / "o"),
        "does not exist",
    )


def test_data_refuses_a_missing_target_before_the_engine_starts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"hello {i}"}) + "\n" for i in range(3)))
    result = run("data", "--target", tmp_path / "no", "--prompts", path, "--output", tmp_path / "o")
    refused(result, "Target")
