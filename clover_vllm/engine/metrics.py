"""Counters of Clover's own, beside vLLM's `vllm:spec_decode_*`.

vLLM's worker has no way to send numbers of a plugin to the process that answers /metrics. So the worker
writes files in the form of prometheus_client's multiprocess mode. With several API servers they lie in
PROMETHEUS_MULTIPROC_DIR, which vLLM sets then and reads by itself; otherwise in a private folder that the
front end makes and exports. A worker on another host counts for itself.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.core import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from vllm.logger import init_logger

from clover_vllm.engine.ray_metrics import push_to_ray
from clover_vllm.tree.budget import Ints
from clover_vllm.tree.kinds import SOURCES
from clover_vllm.tree.outcomes import count_sources
from clover_vllm.tree.step import Step

logger = init_logger("vllm.clover")

PARTS = ("verify", "sample", "move", "draft", "python")
"""Parts of a step whose seconds are counted (see `base.timing`)."""

REASONS = ("structured_output", "unknown_draft", "placeholder_draft", "non_finite_draft")
"""Why a request got a chain, a shorter tree or no draft in a step."""

RECKONING = ("expected_seconds", "observed_seconds", "asleep_seconds")
"""Seconds that steps were expected to take and took, and seconds in which drafting slept, of adaptive trees."""

MIN_DRAFTS = 500
"""Greedy drafts after which acceptance is judged."""

POOR_SHARE = 0.4
"""Acceptance below this share of what the head's config promises causes a warning. A single prompt that is repeated can
stay at half; the head of another target is far below."""

FOLDER_PREFIX = "clover-metrics-"

_TOTALS = ("nodes", "drafts", "promised", "first", "greedy_drafts", "greedy_first")


class Counters:
    """Numbers that only grow, in memory and, once exported, in files too.

    Attributes:
        totals: [6], by `total`: nodes verified; trees verified; accepted nodes that the head expected, the
            sum of its joint probabilities; trees whose most likely node was accepted; the trees of greedy
            requests, and how many of them had their most likely node accepted.
        sizes: [num_nodes + 1], trees by number of nodes verified.
        drafted, accepted: [num_nodes], trees that reached, and that were accepted to, depth i + 1.
        seconds: [len(PARTS)].
        fallbacks: [len(REASONS)].
        nodes_of, accepted_of: [len(SOURCES)], nodes verified and accepted.
        reckoning: [len(RECKONING)].
        trees: totals, sizes, drafted and accepted, one behind the other.
    """

    def __init__(self, num_nodes: int) -> None:
        """
        Args:
            num_nodes: most nodes per tree.
        """
        depths, sources = num_nodes, len(SOURCES)
        sizes = (
            len(_TOTALS),
            num_nodes + 1,
            depths,
            depths,
            len(RECKONING),
            len(PARTS),
            len(REASONS),
            sources,
            sources,
        )
        self._values = np.zeros(sum(sizes) + 1)  # the last stays 0
        parts = np.split(self._values[:-1], np.cumsum(sizes)[:-1])
        self.totals, self.sizes, self.drafted, self.accepted, self.reckoning, *others = parts
        self.seconds, self.fallbacks, self.nodes_of, self.accepted_of = others
        self.trees = self._values[: sum(sizes[:4])]
        self._files: list[tuple[MetricsFile, Ints]] = []  # and the places in `_values` of what stands in it

    def export(self, folder: str, labels: Mapping[str, str]) -> None:
        """Write what is counted from now on to files as well, after every step.

        Args:
            folder: from `export_counters`; empty, or not on this host: nothing is written.
            labels: of all metrics.
        """
        if not folder or not os.path.isdir(folder):
            return
        place = _TOTALS.index
        first, last = len(self.totals), len(self.totals) + len(self.sizes)
        buckets = [*range(first, last), len(self._values) - 1, place("nodes")]
        counted = [place("promised"), place("first"), *range(last, len(self._values) - 1)]
        try:
            self._files = [
                (MetricsFile(folder, "histogram", _histogram(len(self.sizes), labels)), np.array(buckets)),
                (MetricsFile(folder, "counter", _counters(len(self.drafted), labels)), np.array(counted)),
            ]
        except OSError as error:
            logger.warning("Clover-2 cannot export its metrics: %s.", error)
        self._write()

    def _write(self) -> None:
        for file, places in self._files:
            file.write(self._values[places])

    def total(self, name: str) -> float:
        """One of the totals, by name."""
        return float(self.totals[_TOTALS.index(name)])

    def count_step(self, step: Step, greedy: Sequence[bool], seconds: Mapping[str, float]) -> None:
        """Add a finished step.

        Args:
            step: its trees and what of them was accepted.
            greedy: by request, whether it takes the most likely token.
            seconds: by part.
        """
        if step.has_drafts:
            self._count_trees(step, greedy)
        self.count_seconds(seconds)
        self._write()

    def take(self, trees: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Take what was counted of trees elsewhere, since the start; [len(self.trees)]."""
        self.trees[:] = trees
        self._write()

    def _count_trees(self, step: Step, greedy: Sequence[bool]) -> None:
        verified = [
            (tree, nodes, is_greedy)
            for tree, nodes, is_greedy in zip(step.trees, step.accepted, greedy, strict=False)
            if tree is not None and tree.tokens[0] >= 0  # below: padding by the scheduler, not a draft
        ]
        found = [(is_greedy, bool(nodes) and nodes[0] == 0) for _, nodes, is_greedy in verified]
        self.totals += (
            sum(len(tree.tokens) for tree, _, _ in verified),
            len(verified),
            sum(sum(tree.probabilities) for tree, _, _ in verified),
            sum(first for _, first in found),
            sum(is_greedy for is_greedy, _ in found),
            sum(is_greedy and first for is_greedy, first in found),
        )
        self.sizes += _counts([len(tree.tokens) for tree, _, _ in verified], len(self.sizes))
        self.drafted += _reaching([max(tree.depths) for tree, _, _ in verified], len(self.drafted))
        self.accepted += _reaching([len(nodes) for _, nodes, _ in verified], len(self.accepted))
        nodes_of, accepted_of = count_sources(step.trees, step.accepted)
        self.nodes_of += nodes_of
        self.accepted_of += accepted_of

    def count_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by part; they are written with the next step."""
        for i, part in enumerate(PARTS):
            self.seconds[i] += seconds.get(part, 0.0)

    def count_reckoning(self, expected: float, observed: float, asleep: float) -> None:
        """Add seconds by `RECKONING`."""
        self.reckoning += (expected, observed, asleep)

    def count_fallback(self, reason: str) -> None:
        """Add a request that got less speculation for one of `REASONS`."""
        self.fallbacks[REASONS.index(reason)] += 1


def _counts(values: Sequence[int], size: int) -> Ints:
    """How often 0, 1, ... occur, [size]."""
    return np.bincount(np.array(values, dtype=np.int64), minlength=size)


def _reaching(depths: Sequence[int], size: int) -> Ints:
    """How many reach depth 1, 2, ..., [size]."""
    return _counts(depths, size + 1)[:0:-1].cumsum()[::-1]


class AcceptanceWatch:
    """Warns once if greedy requests accept far less than the head's config promises."""

    def __init__(self, counters: Counters, promise: float | None) -> None:
        """
        Args:
            counters: an engine's.
            promise: `Clover2Config.first_acceptance`; without it nothing is judged.
        """
        self._counters = counters
        self._promise = promise

    def look(self) -> None:
        """Judge what has been counted so far."""
        drafts = self._counters.total("greedy_drafts")
        if self._promise is None or drafts < MIN_DRAFTS:
            return
        share = self._counters.total("greedy_first") / drafts
        if share < POOR_SHARE * self._promise:
            logger.warning(
                "Clover-2: the most likely draft token was right in %.0f%% of %d greedy drafts, where the head's "
                "config promises %.0f%%; check that the head belongs to this target and that requests use its chat template.",
                100 * share,
                drafts,
                100 * self._promise,
            )
            self._promise = None


class MetricsFile:
    """A file of prometheus_client's multiprocess mode, all of whose values are written at once."""

    def __init__(self, folder: str, kind: str, keys: Sequence[str]) -> None:
        """
        Args:
            folder: where the file is made, under a name that nobody has.
            kind: "counter" or "histogram".
            keys: of `mmap_key`, in the order of `write`.

        Raises:
            OSError: it cannot be made.
        """
        descriptor, path = tempfile.mkstemp(prefix=f"{kind}_clover-", dir=folder)
        os.close(descriptor)
        made = MmapedDict(path)
        for key in keys:
            made.read_value(key)  # adds it
        made.close()
        places = {key: place for key, _, _, place in MmapedDict.read_all_values_from_file(path)}
        self._places = np.array([places[key] for key in keys]) // 8
        self._values: np.ndarray[Any, np.dtype[np.float64]] = np.memmap(path, dtype=np.float64, mode="r+")
        os.rename(path, f"{path}.db")  # collectors read *.db, and fail on an empty one

    def write(self, values: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Replace all values; [len(keys)]."""
        self._values[self._places] = values


def _key(name: str, sample: str, text: str, labels: Mapping[str, str], **more: str) -> str:
    own = {**labels, **more}
    return str(mmap_key(name, sample, list(own), list(own.values()), text))


def _histogram(sizes: int, labels: Mapping[str, str]) -> list[str]:
    """Keys of the buckets, of the bucket without a bound, and of the sum."""
    name, text = "clover:tree_nodes", "Nodes verified per tree."
    bounds = [*(str(float(size)) for size in range(sizes)), "+Inf"]
    buckets = [_key(name, f"{name}_bucket", text, labels, le=bound) for bound in bounds]
    return [*buckets, _key(name, f"{name}_sum", text, labels)]


def _counters(depths: int, labels: Mapping[str, str]) -> list[str]:
    keys = []
    for name, text in (
        ("clover:promised_tokens", "Accepted nodes that the head expected (joint probability)."),
        ("clover:first_node_accepted", "Trees whose most likely node was accepted."),
    ):
        keys.append(_key(name, f"{name}_total", text, labels))
    for name, text in (
        ("clover:drafted_depth", "Trees that reach a depth."),
        ("clover:accepted_depth", "Trees accepted to a depth."),
    ):
        keys += [_key(name, f"{name}_total", text, labels, depth=str(depth + 1)) for depth in range(depths)]
    for name, text in zip(
        RECKONING,
        ("Seconds that steps were expected to take.", "Seconds that they took.", "Seconds without drafting."),
        strict=True,
    ):
        keys.append(_key(f"clover:{name}", f"clover:{name}_total", text, labels))
    for name, text, label, values in (
        ("clover:step_seconds", "Seconds per part of a step.", "part", PARTS),
        ("clover:fallbacks", "Requests with less speculation.", "reason", REASONS),
        ("clover:source_nodes", "Nodes verified, by who proposed them.", "source", SOURCES),
        ("clover:source_accepted", "Nodes accepted, by who proposed them.", "source", SOURCES),
    ):
        keys += [_key(name, f"{name}_total", text, labels, **{label: value}) for value in values]
    return keys


class CounterCollector(Collector):
    """The counters of this process's engines as Prometheus metrics."""

    def __init__(self) -> None:
        self.folders: list[str] = []

    def collect(self) -> Iterable[Metric]:
        files = [str(file) for folder in self.folders for file in sorted(Path(folder).glob("*.db"))]
        found: Iterable[Metric] = MultiProcessCollector.merge(files)
        return found


_collector = CounterCollector()
_registered: list[Collector] = []


def export_counters(config: Any) -> str:
    """Find or make the folder for the counters of a configuration; for the front end.

    Args:
        config: the `CloverSpeculativeConfig`; a folder made here is exported until it is deleted.

    Returns:
        the folder, for `Counters.export`; empty where none can be made.
    """
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if shared is not None:
        return shared
    remove_stale_folders()
    try:
        folder, lock = _locked_folder()
    except OSError as error:
        logger.warning("Clover-2 cannot export its metrics: %s.", error)
        return ""
    _collector.folders.append(folder)
    weakref.finalize(config, _remove_folder, folder, lock, os.getpid())
    push_to_ray(folder)
    if not _registered:
        REGISTRY.register(_collector)
        _registered.append(_collector)
    return folder


def _locked_folder() -> tuple[str, int]:
    """A folder for this user alone, and the lock that shows others that it is in use; it ends with the process.

    Raises:
        OSError: none can be made.
    """
    while True:
        folder = tempfile.mkdtemp(prefix=FOLDER_PREFIX)
        # Until it is locked, another start may take it for a stale one and remove it.
        with suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.stat(folder)
            except OSError:
                os.close(lock)
                raise
            return folder, lock


def _remove_folder(folder: str, lock: int, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the front end
        return
    _collector.folders.remove(folder)
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def remove_stale_folders() -> None:
    """Remove the folders that killed front ends of this user have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):  # in use, another user's, or gone
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
            finally:
                os.close(lock)
