"""Answers are the target's own, survive kills, and bad prompts are refused before the engine starts."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from engines import Script
from length import length
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.base.prompts import Prompt, read_prompts
from clover_vllm.train.generate import engine_options, generate
from clover_vllm.train.settings import DataSettings

KILLS = length(1, 10)
LIMIT = 18 * KILLS


def arguments(target: Path, prompts: Path, output: Path) -> dict[str, Any]:
    return {
        "target": str(target),
        "prompts": [str(prompts)],
        "output": str(output),
        "max_tokens": 24,
        "shard_size": 4,
        "limit": LIMIT,
        "max_num_seqs": 8,
        "max_model_len": 64,
        "dtype": "bfloat16",
        "flags": ["--enforce-eager"],
    }


def shards(output: Path) -> list[Path]:
    return sorted(output.glob("answers-*.jsonl.gz"))


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in shards(output) for line in gzip.open(path, "rt")]


@pytest.mark.engine
@pytest.mark.timeout(1800)
def test_kills_at_random_moments_leave_the_same_answers(
    spoken_target: Path, prompt_file: Path, tmp_path: Path
) -> None:
    with Script(
        "run_generate", arguments(spoken_target, prompt_file, tmp_path / "whole"), anew=True
    ) as whole:
        whole.answer()
    count = len(shards(tmp_path / "whole"))
    assert count >= 4 * KILLS  # kills, a few shards each, never come near the end

    broken = arguments(spoken_target, prompt_file, tmp_path / "broken")
    rng = random.Random(3)
    startup = 0.0
    for kill in range(KILLS):
        done, started = len(shards(tmp_path / "broken")), time.monotonic()
        with Script("run_generate", broken) as script:
            # Odd ones while it starts (or at its first shard, should this start be a quick one), even ones while it
            # generates or writes.
            latest = started + rng.uniform(0.05, 0.9) * startup if kill % 2 else float("inf")
            while (
                time.monotonic() < latest and not script.ended() and len(shards(tmp_path / "broken")) <= done
            ):
                time.sleep(0.002)
            startup = startup or time.monotonic() - started
            if not kill % 2:
                time.sleep(rng.uniform(0.0, 0.05))
            assert not script.ended(), script.log()
            script.kill()
    assert 0 < len(shards(tmp_path / "broken")) < count
    with Script("run_generate", broken) as script:
        script.answer()
    for one, two in zip(shards(tmp_path / "whole"), shards(tmp_path / "broken"), strict=True):
        assert one.read_bytes() == two.read_bytes()

    found = rows(tmp_path / "broken")
    assert len(found) == len([p for p in read_prompts([prompt_file]) if not p.held_out][:LIMIT])
    temperatures = [r["temperature"] for r in found]
    assert 0.3 < sum(t == 0 for t in temperatures) / len(found) < 0.7
    assert all(t == 0 or 0.7 <= t <= 1.0 for t in temperatures)
    assert len({t for t in temperatures if t}) > 5
    assert all(1 <= len(r["answer_ids"]) <= 24 for r in found)
    summary = json.loads((tmp_path / "broken" / "summary.json").read_text())
    assert summary["answer_tokens"] == sum(len(r["answer_ids"]) for r in found)
    assert summary["peak_memory_gib"] > 0
    assert summary["settings"]["max_temperature"] == 1.0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "no prompt"),
        ("\n\n", "no prompt"),
        ("{", "line 1: not JSON"),
        ('{"prompt": "a"}\n[1]', "line 2: not a JSON object"),
        ('{"text": "a"}', "needs one of"),
        ('{"prompt": "  "}', "empty"),
        ('{"prompt": 3}', "empty"),
        ('{"turns": []}', "turns"),
        ('{"messages": [{"role": "user"}]}', "messages"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "empty"),
    ],
)
def test_malformed_prompts_are_refused_in_one_sentence(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=named) as caught:
        generate(DataSettings("nowhere", [path], tmp_path / "out"))
    one_sentence(caught.value)


def test_prompt_forms(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    user = {"role": "user", "content": "hi"}
    lines = [
        {"prompt": "hi", "source": "s"},
        {"turns": ["hi", "and then"], "category": "c"},
        {"messages": [user, {"role": "assistant", "content": "yes"}]},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert read_prompts([path]) == [Prompt("s", [user]), Prompt("c", [user]), Prompt("p", [user])]


def test_held_out_rule_is_the_documented_one() -> None:
    import hashlib

    texts = [f"prompt {i}" for i in range(500)]
    held = [t for t in texts if Prompt("s", [{"role": "user", "content": t}]).held_out]
    assert held == [t for t in texts if int(hashlib.sha1(t.encode()).hexdigest(), 16) % 50 == 0]
    assert held


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"greedy_share": 1.5}, "greedy-share"),
        ({"min_temperature": 0.0}, "min-temperature"),
        ({"min_temperature": 1.2}, "min-temperature"),
        ({"max_tokens": 0}, "max-tokens"),
        ({"max_tokens": 64, "max_model_len": 64}, "max-model-len"),
        ({"skip": 1000}, "No prompt is left"),
        ({"dtype": "int3"}, "--dtype"),
        ({"tasks": 5, "held_out": True}, "--held-out"),
        ({"task_answers": [Path("answers.jsonl")]}, "--task-answers"),
        ({"max_tokens": 62, "max_model_len": 63}, "longer than the 1 tokens"),
        ({"prompts": [Path("missing.jsonl")]}, "does not exist"),
    ],
)
def test_impossible_settings_are_refused_before_the_engine_starts(
    changes: dict[str, Any], named: str, spoken_target: Path, prompt_file: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {
        "target": str(spoken_target),
        "prompts": [prompt_file],
        "output": tmp_path / "out",
    }
    with pytest.raises(UserError, match=named) as caught:
        generate(DataSettings(**(fields | changes)))
    one_sentence(caught.value)


def test_flags_of_vllm_reach_the_engine() -> None:
    flags = ["--tensor-parallel-size", "2", "--gpu-memory-utilization=0.5", "--no-enable-prefix-caching"]
    wanted = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "enable_prefix_caching": False}
    assert engine_options(flags) == wanted
    assert engine_options([]) == {}
    with pytest.raises(UserError, match="--target") as caught:
        engine_options(["--model", "other"])
    one_sentence(caught.value)
    with pytest.raises(SystemExit, match="2"):
        engine_options(["--max-token", "5"])


def test_a_damaged_answer_for_tasks_is_named(spoken_target: Path, prompt_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "answers.jsonl"
    good = {"prompt_ids": [1], "answer_ids": [2], "finish": "stop"}
    for line in ('{"prompt_ids": [1', '{"prompt_ids": [1]}', "[]"):
        broken.write_text(f"{json.dumps(good)}\n{line}\n")
        fields: dict[str, Any] = {"tasks": 5, "task_answers": [broken], "output": tmp_path / "out"}
        with pytest.raises(UserError, match=r"answers\.jsonl, line 2") as caught:
            generate(DataSettings(target=str(spoken_target), prompts=[prompt_file], **fields))
        one_sentence(caught.value)
