"""`clover-vllm bench`: numbers from runs, side by side; a real comparison on a tiny target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small import one_sentence
from typer.testing import CliRunner

from clover_vllm.base.errors import UserError
from clover_vllm.bench.compare import parse_list, read_prompts, share_out
from clover_vllm.bench.methods import select
from clover_vllm.bench.report import Comparison, acceptance_by_depth, acceptance_length, split, table
from clover_vllm.bench.through_llm import Result, orders
from clover_vllm.bench.worker import Run
from clover_vllm.check.tiny import make_tiny_pair
from clover_vllm.cli import app
from clover_vllm.heads.checkpoint import save_head
from clover_vllm.heads.clover2 import Clover2DraftModel


def comparison() -> Comparison:
    plain = [
        Run(seconds=2.0, tokens=100, steps=100, decode_steps=90, decode_seconds=0.9, outputs=[[1], [2]]),
        Run(seconds=1.0, tokens=100, steps=100, decode_steps=90, decode_seconds=0.9, outputs=[[1], [2]]),
    ]
    fast = [
        Run(
            seconds=1.0,
            tokens=100,
            steps=40,
            drafts=40,
            draft_tokens=320,
            accepted=60,
            accepted_by_depth=[30, 20, 10, 0],
            decode_steps=40,
            decode_seconds=0.8,
            parts={"verify": 0.4, "draft": 0.1, "move": 0.01},
            outputs=[[1], [3]],
        ),
        Run(seconds=1.0, tokens=100, steps=40, drafts=40, accepted=60, outputs=[[1], [3]]),
    ]
    return Comparison([Result("plain", 1, plain), Result("clover-8", 1, fast)])


def test_speedups_are_paired_by_repetition() -> None:
    found = comparison()
    result = found.of("clover-8", 1)
    assert found.speedups(result) == [2.0, 1.0]
    row = found.rows()[1]
    assert row["speedup"] == 1.5
    assert row["speedup_sd"] == pytest.approx(0.7071, abs=1e-4)
    assert row["equal_to_baseline"] == 0.5


def test_acceptance_counts_the_bonus_token() -> None:
    runs = comparison().of("clover-8", 1).runs
    assert acceptance_length(runs) == 2.5
    assert acceptance_by_depth(runs) == [30 / 80, 20 / 80, 10 / 80]
    assert acceptance_length([Run()]) == 1.0


def test_time_split_adds_up_to_the_decode_step() -> None:
    found = split(comparison().of("clover-8", 1).runs)
    assert found["verify"] == pytest.approx(10.0)
    assert sum(found.values()) == pytest.approx(20.0)
    assert split(comparison().of("plain", 1).runs) == {}


def test_orders_alternate() -> None:
    assert list(orders(3, 3)) == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def test_table_names_every_method() -> None:
    assert table(comparison()).row_count == 2


def test_methods_are_selected_by_name() -> None:
    chosen = select(["clover-8", "plain", "clover-12", "clover-8"], None, None)
    assert [method.name for method in chosen] == ["plain", "clover-8", "clover-12"]
    assert chosen[2].speculative is not None
    assert chosen[2].speculative["num_speculative_tokens"] == 12
    for name in ("clover-0", "clover-x", "medusa"):
        with pytest.raises(UserError) as caught:
            select([name], None, None)
        one_sentence(caught.value)


def test_prompts_that_do_not_fit_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt_ids": [5] * n}) + "\n" for n in (3, 9, 4)))
    assert read_prompts(file, 5, 6, "none") == [[5] * 3, [5] * 4]
    for bad in ("nonsense\n", '{"x": 1}\n', ""):
        file.write_text(bad)
        with pytest.raises(UserError) as caught:
            read_prompts(file, 5, 6, "none")
        one_sentence(caught.value)


def test_no_prompt_is_asked_twice_while_there_are_enough() -> None:
    prompts = [[i] for i in range(14)]
    portions, warm_up = share_out(prompts, 5, 2)
    assert [*portions[0], *portions[1], *warm_up] == prompts
    portions, warm_up = share_out(prompts, 5, 4)
    assert all(len({i for (i,) in portion}) == 5 for portion in portions)
    assert {i for portion in portions for (i,) in portion} == set(range(14))
    assert warm_up == prompts[:4]
    assert share_out(prompts[:3], 5, 2) == ([prompts[:3], prompts[:3]], prompts[:3])


def test_lists_of_numbers() -> None:
    assert parse_list("4,1,4") == [1, 4]
    with pytest.raises(UserError) as caught:
        parse_list("1;2")
    one_sentence(caught.value)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--dtype", "int8"], "--dtype"),
        (["--methods", "clover-99"], "clover-99"),
        (["--concurrency", "0"], "--concurrency"),
        (["--repetitions", "0"], "--repetitions"),
    ],
)
def test_impossible_settings_are_refused_before_an_engine_starts(wrong: list[str], named: str) -> None:
    done = CliRunner().invoke(app, ["bench", *wrong])
    assert done.exit_code == 2
    assert named in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_kernel_runs_and_refuses_impossible_shapes(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["kernel", "--requests", "1", "--contexts", "40", "--output", str(tmp_path / "out.json")]
    )
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.json").read_text())
    for wrong in (["--requests", "0"], ["--contexts", "-200"], ["--dtype", "int8"]):
        done = CliRunner().invoke(app, ["kernel", *wrong])
        assert done.exit_code == 2
        assert wrong[0] in done.output
        assert "Traceback" not in done.output


@pytest.mark.engine
def test_bench_runs_on_a_tiny_target(
    tiny_target: Path, fitting_head: Clover2DraftModel, tmp_path: Path
) -> None:
    """In float32 all greedy outputs are plain vLLM's; JSON and plots are written."""
    head, output, prompts = tmp_path / "head", tmp_path / "out", tmp_path / "prompts.jsonl"
    save_head(fitting_head, head)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 200, (12,), generator=generator).tolist() for _ in range(4)]
    prompts.write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in rows))
    command = ["bench", "--target", str(tiny_target), "--head", str(head), "--prompts", str(prompts)]
    command += ["--methods", "clover-4", "--concurrency", "1,2", "--repetitions", "1", "--max-tokens", "16"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--output", str(output)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads((output / "bench.json").read_text())
    assert [(r["method"], r["concurrency"]) for r in found["results"]] == [
        ("plain", 1),
        ("clover-4", 1),
        ("plain", 2),
        ("clover-4", 2),
    ]
    assert all(r["equal_to_baseline"] == 1.0 for r in found["results"])
    assert all(r["tokens_per_second"] > 0 for r in found["results"])
    assert found["results"][1]["ms_by_part"]["draft"] > 0
    assert found["packages"]["torch"]
    for name in ("speedup", "tokens-per-draft", "time-split"):
        assert (output / f"{name}.png").stat().st_size > 1000
    assert str(tmp_path) not in json.dumps(found["methods"])


@pytest.mark.server
def test_bench_runs_through_servers(tmp_path: Path) -> None:
    """`vllm serve`, loaded by vLLM's own `vllm bench serve`."""
    target, head = make_tiny_pair(tmp_path)
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out"
    rows = [{"prompt_ids": [40 + i, 70, 90 + i, 120]} for i in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["bench", "--server", "--target", str(target), "--head", str(head), "--prompts", str(prompts)]
    command += ["--methods", "clover-4", "--concurrency", "2", "--repetitions", "1", "--num-prompts", "3"]
    command += ["--max-tokens", "12", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    done = CliRunner().invoke(app, [*command, "--output", str(output)])
    assert done.exit_code == 0, done.output
    plain, clover = json.loads((output / "bench.json").read_text())["results"]
    assert plain["acceptance_length"] == 1.0
    assert clover["nodes_per_draft"] > 1
    assert clover["equal_to_baseline"] == 1.0
    assert clover["tokens_per_second"] > 0
