"""A batch through Ray Data loses no line when engines die. Engines are stand-ins here, so that it takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

from engines import Json, run_script

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
