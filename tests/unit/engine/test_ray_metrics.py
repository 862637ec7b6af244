"""What engines under Ray count is added to Ray's counters once."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from clover_vllm.cluster.dashboard import ray_name
from clover_vllm.engine import metrics, ray_metrics
from clover_vllm.engine.metrics import Counters
from clover_vllm.engine.ray_metrics import Gains
from clover_vllm.tree import Tree
from clover_vllm.tree.step import Step

SUMS: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}


class Counter:
    """With the interface of vLLM's RayCounterWrapper, and its names as exporters show them."""

    def __init__(self, name: str, text: str, labels: list[str]) -> None:
        assert text
        self.name, self.labelnames = name, labels

    def labels(self, **labels: str) -> Counter:
        assert sorted(labels) == sorted(self.labelnames)
        made = Counter(self.name, "-", self.labelnames)
        made.values = tuple(sorted(labels.items()))
        return made

    def inc(self, value: float) -> None:
        assert value > 0
        key = (f"ray_{self.name.replace(':', '_')}_total", self.values)
        SUMS[key] = SUMS.get(key, 0.0) + value

    values: tuple[tuple[str, str], ...] = ()


def test_gains_add_up_to_what_was_counted(tmp_path: Path) -> None:
    """Two engines, three looks; one of the engines starts late."""
    SUMS.clear()
    gains = Gains(str(tmp_path), Counter)
    engines = []
    for engine in "01":
        counters = Counters(4)
        counters.export(str(tmp_path), {"model_name": "small", "engine": engine})
        engines.append(counters)
        for counters in engines:
            step = Step([Tree([5, 6], [-1, -1], [0.6, 0.3])], [3])
            step.accepted = [[0]]
            counters.count_step(step, [True], {"verify": 0.5})
        gains.push()
    gains.push()
    assert {
        labels: value for (name, labels), value in SUMS.items() if name == "ray_clover_tree_nodes_sum_total"
    } == {
        (("engine", "0"), ("model_name", "small")): 4.0,
        (("engine", "1"), ("model_name", "small")): 2.0,
    }
    names = {name for name, _ in SUMS}
    assert {
        ray_name(name)
        for name in (
            "clover:tree_nodes_count",
            "clover:tree_nodes_bucket",
            "clover:accepted_depth_total",
            "clover:step_seconds_total",
        )
    } <= names


def test_only_ray_actors_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(threading.Thread, "start", lambda self: started.append(self.name))

    class Config:
        pass

    config = Config()
    metrics.export_counters(config)
    assert not started
    monkeypatch.setattr(ray_metrics, "is_in_ray_actor", lambda: True)
    other = Config()
    metrics.export_counters(other)
    assert started == ["clover-ray-metrics"]
