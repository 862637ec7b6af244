"""`clover-vllm bench`: numbers from runs, side by side; a real comparison on a tiny target."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from compared import assert_compared
from forked import fork_json_processes
from length import FULL
from small import one_sentence
from typer.testing import CliRunner

from clover_vllm.base.errors import UserError
from clover_vllm.base.progress import Work
from clover_vllm.base.show import print_table
from clover_vllm.bench.compare import _loads as loads_of
from clover_vllm.bench.compare import _prompts as prompts_for
from clover_vllm.bench.compare import (
    fitting_prompts,
    keeps,
    nearest,
    requests_of,
    share_out,
    span_of,
    split_prompts,
)
from clover_vllm.bench.loop import Load, Request, Result, count_runs, orders, run_loads, sweep
from clover_vllm.bench.methods import Method, select
from clover_vllm.bench.plots import digest as digest_of
from clover_vllm.bench.plots import draw_speedups, source_of
from clover_vllm.bench.report import (
    Comparison,
    acceptance_by_depth,
    acceptance_length,
    bootstrap_interval,
    split,
    table,
)
from clover_vllm.bench.settings import BenchSettings
from clover_vllm.bench.through_server import _bench_serve, steady_part
from clover_vllm.bench.worker import Run
from clover_vllm.check.tiny import make_tiny_pair
from clover_vllm.cli import app
from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import save_head


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
    return Comparison([Result("plain", 1, plain), Result("clover-8", 1, fast, "tree of 8")])


def test_speedups_are_paired_by_repetition() -> None:
    found = comparison()
    result = found.of("clover-8", 1)
    assert found.speedups(result) == [2.0, 1.0]
    row = found.rows()[1]
    assert row["speedup"] == 1.5
    assert row["speedup_interval"] == [1.0, 2.0]
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


def test_interval_holds_the_mean_in_95_of_100_samples() -> None:
    generator = np.random.default_rng(1)
    samples = generator.normal(1.5, 0.2, (300, 20))
    held = [low <= 1.5 <= high for low, high in (bootstrap_interval(list(sample)) for sample in samples)]
    assert 0.9 <= sum(held) / len(held) <= 0.98
    assert bootstrap_interval([1.2]) == [1.2, 1.2]


def test_table_shows_method_settings_and_interval(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(table(comparison()))
    printed = capsys.readouterr().out
    for text in ("plain", "clover-8", "tree of 8", "1.50 [1.00, 2.00]", "100.0 [100.0, 100.0]"):
        assert text in printed


def test_plot_shows_the_speedups_and_their_intervals() -> None:
    _, axis = plt.subplots()
    draw_speedups(axis, comparison().rows())
    lines = {bars.get_label(): bars for bars in axis.containers}
    assert set(lines) == {"plain", "clover-8"}
    drawn, caps, _ = lines["clover-8"]
    assert drawn.get_xydata().tolist() == [[1.0, 1.5]]
    assert sorted(cap.get_ydata()[0] for cap in caps) == [1.0, 2.0]


class Fake:
    """A contender whose speed is known."""

    def __init__(self, rate: int, log: list[tuple[str, int]], name: str) -> None:
        self.rate, self.log, self.name = rate, log, name

    def turns(self, requests: Sequence[Request], concurrency: int) -> Iterator[Run | None]:
        self.log.append((f"{self.name} {requests[0]['prompt']}", concurrency))
        yield Run(seconds=1.0, tokens=self.rate)


def loads(*concurrencies: int) -> list[Load]:
    return [
        Load(c, [{"prompt": "warm"}] * c, [[{"prompt": "one"}], [{"prompt": "two"}]]) for c in concurrencies
    ]


def test_every_batch_size_is_warmed_before_it_is_measured() -> None:
    log: list[tuple[str, int]] = []
    methods = [Method("plain", None), Method("ngram", {})]
    with Work("runs", None) as work:
        found = run_loads(lambda m: nullcontext(Fake(5, log, m.name)), loads(1, 4), lambda _: methods, work)
    assert log[:6] == [
        ("plain warm", 1),
        ("ngram warm", 1),
        ("plain one", 1),
        ("ngram one", 1),
        ("ngram two", 1),
        ("plain two", 1),
    ]
    assert log[6:8] == [("plain warm", 4), ("ngram warm", 4)]
    assert len(log) == count_runs(loads(1, 4), lambda _: methods)
    assert [(r.method, r.concurrency, r.rates) for r in found][1] == ("ngram", 1, [5.0, 5.0])


def test_methods_take_turns_until_all_have_ended() -> None:
    turns: list[str] = []

    class Slow(Fake):
        def turns(self, requests: Sequence[Request], concurrency: int) -> Iterator[Run | None]:
            for _ in range(self.rate):
                turns.append(f"{self.name} {requests[0]['prompt']}")
                yield None
            yield Run(seconds=self.rate, tokens=1)

    methods = [Method("plain", None), Method("ngram", {})]
    rates = {"plain": 3, "ngram": 1}
    with Work("runs", None) as work:
        found = run_loads(
            lambda m: nullcontext(Slow(rates[m.name], [], m.name)), loads(1), lambda _: methods, work
        )
    assert turns[4:] == [
        *("plain one", "ngram one", "plain one", "plain one"),
        *("ngram two", "plain two", "plain two", "plain two"),
    ]
    assert [[run.seconds for run in result.runs] for result in found] == [[3, 3], [1, 1]]


def test_sweep_takes_the_fastest_settings_at_each_concurrency() -> None:
    small, large = (Method("clover", {"n": n}, f"tree of {n}") for n in (3, 8))
    plain = Method("plain", None)
    log: list[tuple[str, int]] = []

    class Depends(Fake):
        def turns(self, requests: Sequence[Request], concurrency: int) -> Iterator[Run | None]:
            self.rate = concurrency if self.name == small.settings else 3
            return super().turns(requests, concurrency)

    with Work("runs", None) as work:
        best = sweep(
            lambda m: nullcontext(Depends(0, log, m.settings)), loads(1, 4), [[plain], [large, small]], work
        )
    assert best == {1: [plain, large], 4: [plain, small]}
    assert not any(name.startswith(" ") for name, _ in log), "plain has nothing to sweep"


def test_engines_that_are_not_needed_any_more_end() -> None:
    running: set[str] = set()

    @contextmanager
    def start(method: Method) -> Iterator[Fake]:
        running.add(method.name)
        yield Fake(1, [], method.name)
        running.discard(method.name)

    seen: list[set[str]] = []

    def methods(concurrency: int) -> list[Method]:
        seen.append(set(running))
        return [Method("plain", None), Method(f"best at {concurrency}", {})]

    with Work("runs", None) as work:
        run_loads(start, loads(1, 4, 16), methods, work)
    assert seen == [set(), {"plain", "best at 1"}, {"plain", "best at 4"}]
    assert not running


def test_development_prompts_are_in_no_figure() -> None:
    prompts = [[i % 90] for i in range(120)]
    figures, development = split_prompts(prompts)
    assert not {*map(tuple, figures)} & {*map(tuple, development)}
    assert sorted([*figures, *development]) == [[i] for i in range(90)]
    assert len(development) == 11
    assert split_prompts([[1]]) == ([[1]], [])


def test_answers_of_a_run_end_at_different_lengths_evenly_spread() -> None:
    requests = requests_of([[1, i] for i in range(64)], 96, 0.0)
    lengths = [request["params"]["max_tokens"] for request in requests]
    assert span_of(requests) == [49, 143]
    assert abs(np.mean(lengths) - 96) < 1
    assert lengths != sorted(lengths)
    assert max(b - a for a, b in pairwise(sorted(lengths))) <= 2
    assert [request["prompt"] for request in requests] == [[1, i] for i in range(64)]
    again = requests_of([[1, i] for i in range(64)], 96, 0.0, seed=1)
    assert sorted(lengths) == sorted(request["params"]["max_tokens"] for request in again)
    assert requests != again
    assert span_of(requests_of([[1]] * 9, 1, 0.8)) == [1, 1]
    assert [r["params"]["seed"] for r in requests_of([[1]] * 3, 8, 0.8)] == [0, 1, 2]


def test_server_clock_runs_while_every_place_is_taken() -> None:
    """Five requests, two at a time: two have ended at 14 s; the last begins at 16 s, where another ends."""
    found = {
        "start_times": [10.0, 10.0, 12.0, 14.0, 16.0],
        "latencies": [2.0, 4.0, 4.0, 4.0, 4.0],
        "ttfts": [1.0] * 5,
        "itls": [[1.0], [1.0] * 3, [1.0] * 3, [1.0] * 3, [1.0] * 3],
        "output_lens": [4, 8, 8, 8, 8],
    }
    run = steady_part(found, 2)
    assert (run.seconds, run.tokens, run.answered) == (4.0, 4 + 8 + 4, 8 + 8)
    assert (run.decode_seconds, run.decode_tokens) == (1.0, 2 * 7 / 3)  # of a step
    run = steady_part(found, 1)
    assert (run.seconds, run.tokens, run.answered) == (8.0, 4 + 8 + 8 + 8, 8 + 8 + 8)


def test_a_server_s_pace_is_that_of_the_steady_part() -> None:
    """The first two answers come quickly, a token at a time; later ones two tokens a second."""
    found = {
        "start_times": [0.0, 0.0, 10.0, 10.0, 20.0, 20.0],
        "latencies": [10.0] * 6,
        "ttfts": [1.0, 1.0, 7.0, 7.0, 7.0, 7.0],
        "itls": [[0.5] * 18] * 2 + [[1.0] * 3] * 4,
        "output_lens": [19, 19, 7, 7, 7, 7],
    }
    run = steady_part(found, 2)
    assert (run.seconds, run.tokens, run.answered) == (20.0, 28, 28)
    assert (run.decode_seconds, run.decode_tokens) == (1.0, 2 * 2)  # of a step


def test_the_order_of_lengths_is_another_in_each_repetition() -> None:
    settings = BenchSettings(concurrency=[2], repetitions=3)
    (load,) = loads_of(settings, [[1, i] for i in range(200)], 3)
    orders = [[request["params"]["max_tokens"] for request in run] for run in load.runs]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_loads_whose_baseline_gave_no_token_are_left_out_and_named() -> None:
    silent = [Result("plain", 1, [Run(seconds=1.0)]), Result("clover", 1, [Run(seconds=1.0, tokens=9)])]
    told = [Result(name, 4, [Run(seconds=1.0, tokens=8, outputs=[[1]])]) for name in ("plain", "clover")]
    found = Comparison([*silent, *told])
    assert [row["concurrency"] for row in found.rows()] == [4, 4]
    one_sentence(found.left_out())
    assert "with 1 requests at once" in found.left_out()
    with pytest.raises(UserError, match="gave no token") as caught:
        Comparison(silent)
    one_sentence(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("no answer"), SystemExit(2)])
def test_a_load_generator_that_fails_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    def main(_: object) -> None:
        print("what it said")
        raise error

    monkeypatch.setattr("vllm.benchmarks.serve.main", main)
    with pytest.raises(UserError, match="vllm bench serve failed") as caught:
        _bench_serve(["--backend", "openai"])
    one_sentence(caught.value)
    assert "what it said" in capsys.readouterr().err


def test_methods_are_selected_by_name() -> None:
    chosen = select(["clover-8", "plain", "clover-12", "clover-8"], None, None)
    assert [grid[0].name for grid in chosen] == ["plain", "clover-8", "clover-12"]
    assert chosen[2][0].speculative is not None
    assert chosen[2][0].speculative["num_speculative_tokens"] == 12
    for name in ("clover-0", "clover-x", "medusa"):
        with pytest.raises(UserError) as caught:
            select([name], None, None)
        one_sentence(caught.value)


def test_ngram_looks_up_shorter_matches_too() -> None:
    for method in select(["ngram"], None, None)[1]:
        assert method.speculative is not None
        assert (method.speculative["prompt_lookup_min"], method.speculative["prompt_lookup_max"]) == (2, 4)


def test_settings_of_a_grid_differ() -> None:
    *swept, adaptive = select(["ngram", "eagle", "clover-chain", "clover"], None, None)[1:]
    for grid in swept:
        assert len({method.settings for method in grid}) == len(grid) > 1
        assert len({method.name for method in grid}) == 1
    assert len(adaptive) == 1, "it chooses by itself"


def test_a_sweep_has_prompts_for_its_concurrency(tmp_path: Path) -> None:
    """However few its runs need: the development split is the smaller one."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt_ids": [1, i]}) + "\n" for i in range(300)))
    settings = BenchSettings(sweep=True, concurrency=[16], repetitions=1, num_prompts=32)
    figures, development = prompts_for(settings, file, "none")
    assert keeps(figures, 16)
    assert keeps(development, 16)
    # What is too much for the split takes the settings of the nearest load; something must be left.
    settings = replace(settings, concurrency=[16, 64], num_prompts=128)
    assert [keeps(prompts_for(settings, file, "none")[1], c) for c in (16, 64)] == [True, False]
    assert [nearest([4, 16], c) for c in (1, 4, 16, 64)] == [4, 4, 16, 16]
    with pytest.raises(UserError, match="to sweep") as caught:
        prompts_for(replace(settings, concurrency=[64]), file, "none")
    one_sentence(caught.value)


def test_prompts_that_do_not_fit_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt_ids": [5] * n}) + "\n" for n in (3, 9, 4)))
    assert fitting_prompts(file, 5, 6, "none") == [[5] * 3, [5] * 4]
    for bad in ("nonsense\n", '{"x": 1}\n', ""):
        file.write_text(bad)
        with pytest.raises(UserError) as caught:
            fitting_prompts(file, 5, 6, "none")
        one_sentence(caught.value)


def test_no_prompt_is_asked_twice_while_there_are_enough() -> None:
    prompts = [[i] for i in range(14)]
    portions, warm_up = share_out(prompts, [5, 3])
    assert [*portions[0], *portions[1], *warm_up] == prompts
    portions, warm_up = share_out(prompts, [5] * 4)
    assert all(len({i for (i,) in portion}) == 5 for portion in portions)
    assert {i for portion in portions for (i,) in portion} == set(range(14))
    assert warm_up == prompts
    assert share_out(prompts[:3], [5, 5]) == ([prompts[:3], prompts[:3]], prompts[:3])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--dtype", "int8"], "--dtype"),
        (["--max-tokens", "1536"], "--max-tokens"),
        (["--methods", "clover-99"], "clover-99"),
        (["--concurrency", "0"], "--concurrency"),
        (["--repetitions", "0"], "--repetitions"),
        (["--num-prompts", "3", "--concurrency", "4"], "--num-prompts"),
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
    assert json.loads((tmp_path / "out.json").read_text())["timings"]
    for wrong in (["--requests", "0"], ["--contexts", "-200"], ["--dtype", "int8"]):
        done = CliRunner().invoke(app, ["kernel", *wrong])
        assert done.exit_code == 2
        assert wrong[0] in done.output
        assert "Traceback" not in done.output


@pytest.mark.engine
def test_bench_runs_on_a_tiny_target(
    tiny_target: Path, fitting_head: Clover2DraftModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 all greedy outputs are plain vLLM's; JSON and plots are written."""
    fork_json_processes(monkeypatch)
    head, output, prompts = tmp_path / "head", tmp_path / "out", tmp_path / "prompts.jsonl"
    save_head(fitting_head, head)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 200, (12,), generator=generator).tolist() for _ in range(20)]
    prompts.write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in rows))
    command = ["bench", "--target", str(tiny_target), "--head", str(head), "--prompts", str(prompts)]
    command += ["--methods", "clover-4", "--concurrency", "1,2", "--repetitions", "1", "--max-tokens", "16"]
    command += ["--num-prompts", "4"]
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
    assert found["provenance"]["torch"]
    assert source_of(output / "speedup.png") == digest_of(output / "bench.json")
    for name in ("speedup", "tokens-per-draft", "time-split"):
        assert (output / f"{name}.png").stat().st_size > 1000
    assert str(tmp_path) not in json.dumps(found["methods"])
    assert "8 of 8 runs" in done.output  # progress, where output is no terminal


if FULL:  # `tests/server` has the same through servers that run already

    @pytest.mark.server
    def test_bench_runs_through_servers(tmp_path: Path) -> None:
        """`vllm serve`, loaded by vLLM's own `vllm bench serve`."""
        target, head = make_tiny_pair(tmp_path)
        prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out"
        rows = [{"prompt_ids": [40 + i, 70, 90 + i, 120]} for i in range(6)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [
            "bench",
            "--server",
            "--target",
            str(target),
            "--head",
            str(head),
            "--prompts",
            str(prompts),
        ]
        command += ["--methods", "clover-4", "--concurrency", "2", "--repetitions", "1", "--num-prompts", "5"]
        command += ["--max-tokens", "12", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
        done = CliRunner().invoke(app, [*command, "--output", str(output)])
        assert done.exit_code == 0, done.output
        assert_compared(output)
