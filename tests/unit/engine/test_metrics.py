"""Counters are counted once, exported whatever the number of engines, and judged."""

from __future__ import annotations

import gc
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from clover_vllm.engine import metrics
from clover_vllm.engine.metrics import AcceptanceWatch, Counters
from clover_vllm.engine.runner import CloverRunner
from clover_vllm.tree import Tree
from clover_vllm.tree.kinds import KINDS, of_head, of_retrieved
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


def test_nodes_are_counted_by_source_and_trees_by_how_far_they_reach() -> None:
    one, two = np.array([1]), np.array([2])
    kinds = [int(kind[0]) for kind in (of_head(one), of_retrieved(two, one), of_head(two))] + [KINDS - 1]
    tree = Tree([5, 6, 7, 8], [-1, -1, 0, 2], [0.6, 0.3, 0.5, 0.25], kinds)
    made = Step([tree, None, tree, tree.prefix(2)], [5, 1, 5, 3])
    made.accepted = [[0, 2, 3], [], [1], []]
    counters = Counters(6)
    counters.count_step(made, [True, True, False, True], {})
    assert counters.nodes_of.tolist() == [2 + 2 + 1, 1 + 1 + 1, 1 + 1]
    assert counters.accepted_of.tolist() == [2, 1, 1]
    assert counters.sizes.tolist() == [0, 0, 1, 0, 2, 0, 0]
    assert counters.drafted.tolist() == [3, 2, 2, 0, 0, 0]
    assert counters.accepted.tolist() == [2, 1, 1, 0, 0, 0]
    assert [counters.total(name) for name in ("first", "greedy_drafts", "greedy_first")] == [1, 2, 1]


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


def test_what_a_device_has_counted_is_taken_over() -> None:
    counters = Counters(2)
    counters.take(np.array([5.0, 3, 1.5, 2, 2, 1, 0, 1, 2, 3, 2, 2, 1]))
    assert (counters.total("nodes"), counters.total("drafts"), counters.total("promised")) == (5, 3, 1.5)
    assert counters.sizes.tolist() == [0, 1, 2]
    assert counters.drafted.tolist() == [3, 2]
    assert counters.accepted.tolist() == [2, 1]
    assert not counters.seconds.any()


class Config:
    """Stands for CloverSpeculativeConfig."""


def exported() -> str:
    registry = CollectorRegistry(auto_describe=True)
    registry.register(metrics._collector)
    return generate_latest(registry).decode()


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this test, without PROMETHEUS_MULTIPROC_DIR."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def check_two_engines(text: str) -> None:
    for engine in (0, 1):
        labels = f'engine="{engine}",model_name="small"'
        assert f"clover:tree_nodes_count{{{labels}}} 1.0" in text
        assert f"clover:tree_nodes_sum{{{labels}}} 4.0" in text
        for size, count in (("3.0", "0.0"), ("4.0", "1.0"), ("+Inf", "1.0")):
            bucket = f'engine="{engine}",le="{size}",model_name="small"'
            assert f"clover:tree_nodes_bucket{{{bucket}}} {count}" in text
        assert f'clover:accepted_depth_total{{depth="1",{labels}}} 1.0' in text
        assert f'clover:accepted_depth_total{{depth="2",{labels}}} 0.0' in text
        assert f"clover:promised_tokens_total{{{labels}}} 1.65" in text
    assert text.count("# TYPE clover:tree_nodes histogram") == 1
    assert text.count("# TYPE clover:fallbacks_total counter") == 1


def count_in_two_engines(folder: str) -> None:
    for engine in ("0", "1"):
        worker = Counters(6)
        worker.export(folder, {"model_name": "small", "engine": engine})
        worker.count_step(step([0]), [True, True], {})


def test_front_end_and_workers_share_a_private_folder_that_goes_with_the_configuration(
    temporary: Path,
) -> None:
    config = Config()
    folder = metrics.export_counters(config)
    assert Path(folder).parent == temporary
    assert Path(folder).stat().st_mode & 0o077 == 0
    assert "clover:tree_nodes" not in exported()
    count_in_two_engines(folder)
    check_two_engines(exported())
    del config
    gc.collect()
    assert not list(temporary.iterdir())
    assert "clover:tree_nodes" not in exported()


def test_several_api_servers_read_the_files_by_prometheus_own_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM sets PROMETHEUS_MULTIPROC_DIR then, and each API server reads it with this collector."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    config = Config()
    folder = metrics.export_counters(config)
    assert folder == str(tmp_path)
    count_in_two_engines(folder)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    check_two_engines(generate_latest(registry).decode())
    assert "clover:tree_nodes" not in exported()


def test_collectors_see_only_files_that_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """prometheus_client cannot read an empty file."""
    original = MmapedDict.read_value

    def look(self: Any, key: str) -> Any:
        assert not list(tmp_path.glob("*.db"))
        return original(self, key)

    monkeypatch.setattr(MmapedDict, "read_value", look)
    metrics.MetricsFile(str(tmp_path), "counter", metrics._counters(2, {"engine": "0"}))
    (made,) = tmp_path.iterdir()
    assert made.name.startswith("counter_")
    assert made.suffix == ".db"
    assert made.stat().st_mode & 0o077 == 0


def test_the_next_start_removes_the_folders_of_killed_front_ends_alone(temporary: Path) -> None:
    alive = Config()
    kept = metrics.export_counters(alive)
    killed = temporary / f"{metrics.FOLDER_PREFIX}killed"
    killed.mkdir()
    (killed / "counter_clover-1.db").write_bytes(b"x")
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    link = temporary / f"{metrics.FOLDER_PREFIX}link"
    link.symlink_to(elsewhere)
    metrics.remove_stale_folders()
    assert not killed.exists()
    assert Path(kept).is_dir()
    assert elsewhere.is_dir()
    assert link.is_symlink()


@pytest.mark.usefixtures("temporary")
def test_without_a_folder_nothing_breaks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(**_: Any) -> Any:
        raise OSError("No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    monkeypatch.setattr(metrics.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm.clover"):
        assert metrics.export_counters(Config()) == ""
    assert "No space left" in caplog.text
    for folder in ("", "/no/such/folder"):
        counters = Counters(6)
        counters.export(folder, {})
        counters.count_step(step([0]), [True, True], {})


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
