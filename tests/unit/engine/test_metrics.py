"""Counters are counted once, exported whatever the number of engines, and judged."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from clover_vllm.engine import metrics
from clover_vllm.engine.metrics import AcceptanceWatch, CounterCollector, Counters
from clover_vllm.engine.runner import CloverRunner
from clover_vllm.tree import Tree
from clover_vllm.tree.step import Step


def step(accepted: list[int]) -> Step:
    """One request with a tree of four nodes and one without drafts."""
    tree = Tree([5, 6, 7, 8], [-1, -1, 0, 2], [0.6, 0.3, 0.5, 0.25])
    made = Step([tree, None], [5, 1])
    made.accepted = [accepted, []]
    return made


def test_a_step_is_counted() -> None:
    counters = Counters(6)
    counters.count_step(step([0, 2]), [True, True], {"verify": 0.5, "draft": 0.25})
    counters.count_step(step([1]), [False, True], {"verify": 0.5})
    counters.count_fallback("unknown_draft")
    assert counters.total("drafts") == 2
    assert counters.total("promised") == pytest.approx(3.3)
    assert (counters.total("first"), counters.total("greedy_drafts"), counters.total("greedy_first")) == (
        1,
        1,
        1,
    )
    assert counters.sizes.tolist() == [0, 0, 0, 0, 2, 0, 0]
    assert counters.drafted.tolist() == [2, 2, 2, 0, 0, 0]
    assert counters.accepted.tolist() == [2, 1, 0, 0, 0, 0]
    assert counters.seconds.tolist() == [1.0, 0.0, 0.0, 0.25, 0.0]
    assert counters.fallbacks.sum() == 1


def test_drafts_with_a_nan_are_counted() -> None:
    """By the runner where it takes over the drafts of a step: one without nodes had a NaN."""
    params = SimpleNamespace(structured_outputs=None)
    runner = SimpleNamespace(
        counters=Counters(6), requests={name: SimpleNamespace(sampling_params=params) for name in "ab"}
    )
    for name, tree in (("a", Tree.chain([5])), ("b", Tree([], []))):
        assert CloverRunner._usable(cast(CloverRunner, runner), name, tree) is tree
    assert runner.counters.fallbacks.tolist() == [float(r == "non_finite_draft") for r in metrics.REASONS]


def test_padding_of_the_scheduler_is_no_draft() -> None:
    made = Step([Tree.chain([-1, -1])], [3])
    made.accepted = [[]]
    counters = Counters(6)
    counters.count_step(made, [True], {})
    assert counters.total("drafts") == 0
    assert not counters.sizes.any()
    assert not counters.drafted.any()


class Config:
    """Stands for CloverSpeculativeConfig."""

    num_speculative_tokens = 6


def test_front_end_and_workers_share_files_that_go_with_the_configuration() -> None:
    config = Config()
    base = metrics.export_counters(config, "small", engines=2)
    paths = [Path(metrics.counters_path(base, engine)) for engine in (0, 1)]
    assert all(path.exists() for path in paths)
    workers = [Counters(6, str(path)) for path in paths]
    assert b"clover:tree_nodes" not in generate_latest(_only(metrics._collector))
    for worker in workers:
        worker.open()
        worker.count_step(step([0]), [True, True], {})
    text = generate_latest(_only(metrics._collector)).decode()
    for engine in (0, 1):
        labels = f'engine="{engine}",model_name="small"'
        assert f"clover:tree_nodes_count{{{labels}}} 1.0" in text
        assert f"clover:tree_nodes_sum{{{labels}}} 4.0" in text
        assert f'clover:accepted_depth_total{{depth="1",{labels}}} 1.0' in text
        assert f'clover:accepted_depth_total{{depth="2",{labels}}} 0.0' in text
    assert text.count("# TYPE clover:tree_nodes histogram") == 1
    del config
    gc.collect()
    assert not any(path.exists() for path in (Path(base), *paths))
    assert b"clover:tree_nodes" not in generate_latest(_only(metrics._collector))


def _only(collector: CounterCollector) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(collector)
    return registry


def test_without_a_file_nothing_breaks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(**_: Any) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr(metrics.tempfile, "mkstemp", full)
    monkeypatch.setattr(metrics.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm.clover"):
        assert metrics.export_counters(Config(), "small", engines=1) == ""
    assert "No space left" in caplog.text
    assert metrics.counters_path("", 0) == ""
    Counters(6, "/no/such/file").count_step(step([0]), [True, True], {})


@pytest.mark.parametrize(
    ("right", "greedy", "promise", "warns"),
    [(100, True, 0.6, True), (400, True, 0.6, False), (100, False, 0.6, False), (0, True, None, False)],
)
def test_acceptance_far_below_the_promise_is_warned_of_once(
    right: int,
    greedy: bool,
    promise: float | None,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(metrics.logger, "propagate", True)
    counters = Counters(6)
    watch = AcceptanceWatch(counters, promise)
    with caplog.at_level(logging.WARNING, logger="vllm.clover"):
        for i in range(1000):
            counters.count_step(step([0] if i < right else []), [greedy, True], {})
            watch.look()
    assert len(caplog.records) == int(warns)
    if warns:
        assert "promises 60%" in caplog.text
