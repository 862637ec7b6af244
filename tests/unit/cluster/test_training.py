"""What training on a Ray cluster refuses, before and in its workers; how it trains is in `tests/cluster/test_ray.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.cluster.training import _absolute, _have_gpus, _work
from clover_vllm.train import trainer
from clover_vllm.train.settings import TrainSettings


def test_each_worker_gets_a_gpu_or_all_get_cores() -> None:
    assert _have_gpus({"CPU": 8.0, "GPU": 4.0}, 4)
    assert not _have_gpus({"CPU": 4.0}, 4)
    for resources in ({"CPU": 8.0, "GPU": 3.0}, {"CPU": 3.0}, {}):
        with pytest.raises(UserError, match="--ray-workers is 4") as caught:
            _have_gpus(resources, 4)
        one_sentence(caught.value)


def test_workers_find_files_wherever_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    made = _absolute(TrainSettings("target", [Path("answers")], Path("run"), init_from=Path("head")))
    paths = made.target, made.data, made.output, made.init_from, made.cache
    assert paths == (
        str(tmp_path / "target"), [tmp_path / "answers"], tmp_path / "run", tmp_path / "head", None
    )  # fmt: skip
    assert _absolute(TrainSettings("some/model", [], Path("run"))).target == "some/model"


def test_what_a_worker_has_refused_is_refused_at_once_when_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def train(*arguments: Any) -> dict[str, Any]:
        started.append(arguments)
        raise UserError("The data cannot be read.")

    monkeypatch.setattr(trainer, "train", train)
    config = {"settings": "settings", "made": {"commit": "x"}, "refusal": tmp_path / "refusal"}
    for _ in range(2):
        with pytest.raises(UserError, match=r"The data cannot be read\."):
            _work(config)
    assert started == [("settings", {"commit": "x"})]
