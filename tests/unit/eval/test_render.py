"""Tables in README and docs are those of `results/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import one_sentence
from typer.testing import CliRunner

from clover_vllm.base.errors import UserError
from clover_vllm.base.provenance import provenance
from clover_vllm.bench.loop import Result
from clover_vllm.bench.report import Comparison, write
from clover_vllm.bench.worker import Run
from clover_vllm.check import torture
from clover_vllm.cli import app
from clover_vllm.eval.evaluate import Replay
from clover_vllm.eval.render import pages, render, rendered, stale
from clover_vllm.eval.report import Evaluation, write_report

REPOSITORY = Path(__file__).parents[3]


def test_readme_and_docs_are_what_the_results_render_to() -> None:
    assert pages(REPOSITORY)
    assert stale(REPOSITORY) == []


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with three results and a page for each."""
    results = tmp_path / "results"
    plain = [Run(seconds=1.0, tokens=n, outputs=[[1]]) for n in (100, 110)]
    trees = [Run(seconds=1.0, tokens=n, outputs=[[1]]) for n in (150, 176)]
    comparison = Comparison([Result("plain", 4, plain), Result("clover", 4, trees, "tree of 5")])
    header: dict[str, Any] = {"swept": [2], "engine": {"model": "m", "dtype": "bfloat16"}}
    header["prompts"] = {"file": "families.jsonl.gz"}
    write(comparison, results, header | {"temperature": 0, "max_tokens": 96, "longest_answers": [48, 144]})
    torture.write(torture.TortureOutcome(requests=1100, compared=1000, tokens=20_000), results)
    replays = [Replay("kind", 12, 4, [3, 2]), Replay("kind", 10, 5, [2, 1])]
    write_report([Evaluation("head", "tree of 8", replays)], results)
    (tmp_path / "docs").mkdir()
    for name, page in (("bench", "README.md"), ("torture", "docs/a.md"), ("eval", "docs/b.md")):
        text = f"before\n\n<!-- generated: {name} -->\nformer text\n<!-- /generated -->\n\nafter\n"
        (tmp_path / page).write_text(text)
    return tmp_path


def test_blocks_are_filled_from_what_the_commands_write(root: Path) -> None:
    assert len(stale(root)) == 3
    assert len(render(root)) == 3
    assert stale(root) == render(root) == []
    bench, torture_page, evaluation = (page.read_text() for page in pages(root))
    assert "163 [150, 176], **1.55** [1.50, 1.60] (tree of 5)" in bench
    assert "at most 48 to 144 tokens an answer" in bench
    assert provenance()["torch"] in bench
    assert "1,000 of 1,100" in torture_page
    assert "| tree of 8 | 2.44 ± 0.35 |" in evaluation
    for text in (bench, torture_page, evaluation):
        assert text.startswith("before\n\n<!-- generated: ")
        assert text.endswith("<!-- /generated -->\n\nafter\n")
        assert "former text" not in text


def bench_rows(
    method: str, ups: dict[int, tuple[float, float, float]], repetitions: int
) -> list[dict[str, Any]]:
    """Rows of bench.json, as far as sentences read them."""
    return [
        {
            "method": method,
            "settings": "",
            "concurrency": count,
            "repetitions": repetitions,
            "tokens_per_second": 100 * mean,
            "speedup": mean,
            "speedup_interval": [low, high],
            "equal_to_baseline": 0.38 + 0.1 * i,
        }
        for i, (count, (mean, low, high)) in enumerate(ups.items())
    ]


@pytest.mark.parametrize(
    ("method", "ups", "repetitions", "verdict"),
    [
        ("clover", {1: (2.2, 1.9, 2.5), 4: (1.1, 0.9, 1.2), 8: (0.9, 0.8, 0.95)}, 3,
         "`clover` was faster with 1, slower with 8 and not clearly more than 3% apart with 4 requests at once."),
        ("clover", {2: (2.2, 1.9, 2.5)}, 2, "`clover` was faster with 2 requests at once."),
        ("clover", {8: (1.02, 1.01, 1.02), 16: (1.02, 1.01, 1.029), 32: (0.98, 0.975, 0.99)}, 2,
         "`clover` was nowhere faster and within 3% of plain with 8, 16 and 32 requests at once."),
        ("clover-8", {1: (0.9, 0.85, 0.95), 16: (0.7, 0.6, 0.8)}, 2, "`clover-8` was nowhere faster and slower with 1 and 16 requests at once."),
        ("clover-chain", {64: (1.0, 0.9, 1.1)}, 2, "`clover-chain` was nowhere faster and not clearly more than 3% apart with 64 requests at once."),
        ("clover", {1: (1.5, 1.4, 1.6)}, 6, "`clover` was faster with 1 requests at once."),
        ("clover", {1: (1.5, 1.5, 1.5)}, 1, "`clover` was run once, so that nothing is known of the spread."),
    ],
)  # fmt: skip
def test_speedups_are_told_for_any_loads_and_methods(
    root: Path, method: str, ups: dict[int, tuple[float, float, float]], repetitions: int, verdict: str
) -> None:
    file = root / "results" / "bench.json"
    plain = dict.fromkeys(ups, (1.0, 1.0, 1.0))
    found = json.loads(file.read_text())
    found["results"] = bench_rows("plain", plain, repetitions) + bench_rows(method, ups, repetitions)
    found["prompts"]["per_run"] = {str(count): 8 * count for count in ups}
    file.write_text(json.dumps(found))
    text = rendered("<!-- generated: speedups -->\n<!-- /generated -->\n", root / "results")
    assert verdict in text
    assert f"| requests at once | {' | '.join(map(str, ups))} |" in text
    cells = [
        f"{f'**{mean:.2f}**' if low > 1.03 else f'{mean:.2f}'} [{low:.2f}, {high:.2f}]"
        for mean, low, high in ups.values()
    ]
    assert f"| `{method}` over plain | {' | '.join(cells)} |" in text
    spread = "the range of" if repetitions < 5 else "95% bootstrap intervals over"
    assert f"in brackets {spread} {repetitions} repetition" in text
    assert f"| plain, tokens/s | {' | '.join(['100'] * len(ups))} |" in text
    assert f"token for token: `{method}` {'38 to ' if len(ups) > 1 else ''}{28 + 10 * len(ups)}%." in text


def test_a_measurement_without_clover_says_so(root: Path) -> None:
    file = root / "results" / "bench.json"
    found = json.loads(file.read_text())
    found["results"] = found["results"][:1]
    file.write_text(json.dumps(found))
    for block in ("speedups", "replicas"):
        text = rendered(f"<!-- generated: {block} -->\n<!-- /generated -->\n", root / "results")
        assert "Clover-2 is not in the" in text


def test_a_changed_result_makes_page_and_picture_stale(root: Path) -> None:
    render(root)
    file = root / "results" / "bench.json"
    found = json.loads(file.read_text())
    found["results"][1]["speedup"] = 9.0
    file.write_text(json.dumps(found))
    assert stale(root) == [root / "README.md", root / "results" / "speedup.png"]
    checked = CliRunner().invoke(app, ["render", str(root), "--check"])
    assert checked.exit_code == 2
    assert "README.md" in checked.output
    assert CliRunner().invoke(app, ["render", str(root)]).exit_code == 0
    assert "**9.00**" in (root / "README.md").read_text()
    assert CliRunner().invoke(app, ["render", str(root), "--check"]).exit_code == 0


def test_blocks_without_a_result_say_which_command_is_missing(tmp_path: Path) -> None:
    text = "<!-- generated: bench -->\n<!-- /generated -->\n"
    assert "`bench`, told to write its output to `results`" in rendered(text, tmp_path)
    assert rendered("no block", tmp_path) == "no block"


def test_without_an_evaluation_the_shipped_heads_is_shown(tmp_path: Path) -> None:
    found = rendered("<!-- generated: eval -->\n<!-- /generated -->\n", tmp_path)
    assert "| tree of 8 | 3.13 ± 0.11 | 2.16 ± 0.05 |" in found
    assert "clover-vllm eval" in found


def test_tables_of_the_code_are_filled() -> None:
    text = "<!-- generated: {} -->\n<!-- /generated -->\n"
    assert "| `draft_min_joint` | `0.3` |" in rendered(text.format("options"), Path())
    assert "| refused |" in rendered(text.format("refused"), Path())


def test_what_failed_on_a_gpu_is_told(tmp_path: Path) -> None:
    made = {"vllm": "1", "torch": "2", "triton": "3", "commit": "4", "command": "clover-vllm gpu-check"}
    step = {"step ms": 5.301, "parts ms": {"target's forward": 4.891}, "tokens per step and request": 1.0}
    cases: dict[str, Any] = {"plain": {"points": {"8 x 512": step}}, "tree of 8": {"error": "stack\nno time"}}
    place = {"requests": 8, "context": 4096, "rows": 27, "dim": 128}
    times = {"floor": 49.92, "rule": 122.4, "rule_splits": 8, "vllm": 262.0, "flash": 199.0}
    tiling = {"block_m": 128, "tile": 32, "warps": 8, "stages": 5, "splits": 2, "us": 67.6}
    timed: list[dict[str, Any]] = [
        {"point": place, "ok": True, **times, "tilings": [tiling]},
        {"point": place, "ok": False, "why": "it does not fit"},
    ]
    others = [{"requests": 1, "nodes": 26, "layers": 32, "walk": 1.7, "move": 2.8}]
    results: dict[str, dict[str, Any]] = {
        "gpu-speed": {"cases": cases},
        "gpu-kernels": {"device": {"name": "GPU"}, "results": {"times": timed, "others": others}},
    }
    for name, found in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"provenance": made, **found}))
    text = "<!-- generated: {} -->\n<!-- /generated -->\n"
    speed_table = rendered(text.format("gpu-speed"), tmp_path)
    assert "| plain | 8 x 512 | 5.30 | 4.89 |" in speed_table
    assert "| tree of 8 | not measured: no time |" in speed_table
    kernel_table = rendered(text.format("gpu-kernels"), tmp_path)
    best = "**67.6** (128 x 32, 8 warps, 5 stages, 2)"
    assert f"| 8 | 4096 | 27 | 128 | 49.9 | 122 (8) | {best} | 262 | 199 |" in kernel_table
    assert "| 8 | 4096 | 27 | 128 | it does not fit |" in kernel_table


def test_damaged_results_and_unknown_blocks_are_refused(root: Path) -> None:
    (root / "results" / "eval.json").write_text("[]")
    for text in (
        "<!-- generated: eval -->\n<!-- /generated -->",
        "<!-- generated: speed -->\n<!-- /generated -->",
        "<!-- generated: bench -->\n",
    ):
        with pytest.raises(UserError) as caught:
            rendered(text, root / "results")
        one_sentence(caught.value)


MADE = {"command": "clover-vllm kernel --output results"}


def test_kernel_and_overhead_results_become_tables(root: Path) -> None:
    timings = [
        {"requests": r, "context": c, "tree": 30.0 * r, "vllm": 20.0 * r} for c in (300, 100) for r in (1, 4)
    ]
    shape = {"rows": 9, "heads": 9, "kv_heads": 3, "dim": 64, "dtype": "bfloat16"}
    kernel = {"provenance": MADE, "shape": shape, "level": "v3", "threads": 2, "timings": timings}
    overhead = {
        "provenance": MADE,
        "results": [
            {
                "requests": 64,
                "drafts": True,
                "nodes": 2.0,
                "total": 92.4,
                "parts": {"choose": 60.2, "read": 0.1},
            }
        ],
    }
    for name, found in (("kernel", kernel), ("overhead", overhead)):
        (root / "results" / f"{name}.json").write_text(json.dumps(found))
    blocks = (
        "<!-- generated: kernel -->\n<!-- /generated -->\n<!-- generated: overhead -->\n<!-- /generated -->\n"
    )
    text = rendered(blocks, root / "results")
    assert "| requests | 100 tokens cached | 300 tokens cached |" in text
    assert "| 4 | 120 / 80 = **1.50** | 120 / 80 = **1.50** |" in text
    assert "level v3" in text
    assert "| 64 | yes | 2.0 | **92** | choose 60 |" in text
