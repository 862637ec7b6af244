"""On Ray, a batch loses no line when engines die (stand-ins, so that it takes seconds), and training goes on when a worker does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from engines import Json, run_script
from length import FULL

from clover_vllm.train.settings import TrainSettings
from clover_vllm.train.trainer import train

SUPPORT = Path(__file__).parents[1] / "support"


def on_ray(folder: Path, what: str) -> Json:
    """What `run_ray` saw; actors find its modules by PYTHONPATH."""
    paths = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found: Json = run_script("run_ray", {"folder": str(folder), "what": what}, env={"PYTHONPATH": paths})
    return found


def test_a_batch_answers_each_line_though_actors_die(tmp_path: Path) -> None:
    seen = on_ray(tmp_path, "batch")
    assert [line for line, _ in seen["batch"]] == list(range(1, 101))
    names = [name for _, name in seen["batch"]]
    assert (names[29], names[69]) == ("kill30", "fatal70")
    assert seen["batch_distinct"] == 100
    assert seen["batch_asked"] <= 100 + 2 * 60  # what an actor had under way, two blocks, is asked again
    assert seen["children"] > 2
    assert seen["orphans"] == []


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="takes minutes: in `make soak`")
def test_two_engines_write_the_shards_that_one_writes(
    spoken_target: Path, prompt_file: Path, tmp_path: Path
) -> None:
    """Though one of them is killed."""
    fields = {
        "target": str(spoken_target),
        "prompts": [str(prompt_file)],
        "max_tokens": 24,
        "shard_size": 8,
        "limit": 160,
        "max_num_seqs": 8,
        "max_model_len": 64,
        "flags": ["--enforce-eager"],
    }
    (tmp_path / "settings.json").write_text(json.dumps(fields))
    seen = on_ray(tmp_path, "data")
    assert seen["engines"] == [2]  # as one was killed
    assert "No host of the cluster has 64 cores" in seen["refused"][0]
    assert "does not start with target" in seen["refused"][1]
    run_script(
        "run_generate",
        fields | {"output": str(tmp_path / "alone")},
        env={"VLLM_CPU_OMP_THREADS_BIND": str(min(os.sched_getaffinity(0)))},
    )
    together, alone = (sorted((tmp_path / name).glob("answers-*.jsonl.gz")) for name in ("run", "alone"))
    assert len(alone) == 20
    assert [path.read_bytes() for path in together] == [path.read_bytes() for path in alone]


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="takes minutes: in `make soak`")
def test_training_goes_on_when_a_worker_is_killed(
    tiny_target: Path, tiny_answers: Path, tmp_path: Path
) -> None:
    """Two workers train as one process that takes twice the batches per step."""
    fields = {
        "target": str(tiny_target),
        "epochs": 6.0,
        "batch_tokens": 32,
        "learning_rate": 1e-3,
        "log_every": 1,
        "save_every": 2,
        "dtype": "float32",
    }
    (tmp_path / "settings.json").write_text(json.dumps(fields | {"data": [str(tiny_answers)]}))
    seen = on_ray(tmp_path, "train")
    assert seen["killed"] == 1
    alone = TrainSettings(data=[tiny_answers], output=tmp_path / "alone", accumulate=2, **fields)  # type: ignore[arg-type]
    summary = train(alone)
    together = seen["summary"]
    assert together["steps"] == summary["steps"]
    assert together["validation_loss"] == pytest.approx(summary["validation_loss"], rel=1e-2)
    curves = [
        [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]
        for folder in (tmp_path / "run", tmp_path / "alone")
    ]
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)
    assert "learning_rate" in seen["refused"]
