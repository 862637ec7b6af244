"""Counters of Clover's own, beside vLLM's `vllm:spec_decode_*`.

vLLM's worker has no way to send numbers of a plugin to the process that answers /metrics. So the process
that makes the configuration, which is the front end, makes a small file and exports what is in it; the
worker maps the same file into memory and counts there. A worker on another host counts for itself, and
with several API server processes vLLM exports its own metrics only: ours are not there then.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.logger import init_logger

from clover_vllm.tree.step import Step

logger = init_logger("vllm.clover")

PARTS = ("verify", "sample", "move", "draft", "python")
"""Parts of a step whose seconds are counted (see `engine.timing`)."""

REASONS = ("structured_output", "unknown_draft", "placeholder_draft", "non_finite_draft")
"""Why a request got a chain, a shorter tree or no draft in a step."""

MIN_DRAFTS = 500
"""Greedy drafts after which acceptance is judged."""

POOR_SHARE = 0.4
"""Acceptance below this share of what the head's config promises is warned of. A single prompt, asked again and again,
may well stay at half; the head of another target is far below."""

_TOTALS = ("opened", "drafts", "promised", "first", "greedy_drafts", "greedy_first")


class Counters:
    """Numbers that only grow, in a file or in memory.

    Attributes:
        totals: [6], by `total`: whether a worker counts here; trees verified; accepted nodes that the head
            expected, the sum of its joint probabilities; trees whose likeliest node was accepted; the
            trees of greedy requests, and those of them whose likeliest node was.
        sizes: [num_nodes + 1], trees by number of nodes verified.
        drafted, accepted: [num_nodes], trees that reached, and that were accepted to, depth i + 1.
        seconds: [len(PARTS)].
        fallbacks: [len(REASONS)].
    """

    def __init__(self, num_nodes: int, path: str = "") -> None:
        """
        Args:
            num_nodes: most nodes per tree.
            path: file to map, made by `export_counters`; one that is not on this host, or none: in memory.
        """
        sizes = _sizes(num_nodes)
        values: np.ndarray[Any, np.dtype[np.float64]]
        if path and os.path.exists(path):
            values = np.memmap(path, dtype=np.float64, mode="r+", shape=(sum(sizes),))
        else:
            values = np.zeros(sum(sizes))
        self.totals, self.sizes, self.drafted, self.accepted, self.seconds, self.fallbacks = np.split(
            values, np.cumsum(sizes)[:-1]
        )

    def total(self, name: str) -> float:
        """One of the totals, by name."""
        return float(self.totals[_TOTALS.index(name)])

    def open(self) -> None:
        """Say that a worker counts here."""
        self.totals[0] = 1.0

    def count_step(self, step: Step, greedy: Sequence[bool], seconds: Mapping[str, float]) -> None:
        """Add a finished step.

        Args:
            step: its trees and what of them was accepted.
            greedy: by request, whether it takes the most likely token.
            seconds: by part.
        """
        for tree, nodes, is_greedy in zip(step.trees, step.accepted, greedy, strict=False):
            if tree is None or tree.tokens[0] < 0:  # the scheduler's padding was no draft of ours
                continue
            first = bool(nodes) and nodes[0] == 0
            promised = sum(tree.probabilities)
            self.totals[1:] += (1, promised, first, is_greedy, is_greedy and first)
            self.sizes[len(tree.tokens)] += 1
            self.drafted[: max(tree.depths)] += 1
            self.accepted[: len(nodes)] += 1
        for i, part in enumerate(PARTS):
            self.seconds[i] += seconds.get(part, 0.0)

    def count_fallback(self, reason: str) -> None:
        """Add a request that got less speculation for one of `REASONS`."""
        self.fallbacks[REASONS.index(reason)] += 1


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
                "Clover-2: the likeliest draft token was right in %.0f%% of %d greedy drafts, where the head's "
                "config promises %.0f%%; is it the head of this target, and do requests use its chat template?",
                100 * share,
                drafts,
                100 * self._promise,
            )
            self._promise = None


class CounterCollector(Collector):
    """The counters of this process's engines as Prometheus metrics."""

    def __init__(self) -> None:
        self._engines: dict[str, tuple[dict[str, str], Counters]] = {}  # by file

    def add(self, path: str, labels: Mapping[str, str], counters: Counters) -> None:
        """Export an engine's counters until `remove`."""
        self._engines[path] = (dict(labels), counters)

    def remove(self, path: str) -> None:
        """Export an engine's counters no longer."""
        self._engines.pop(path, None)

    def describe(self) -> Iterator[Metric]:
        """The names of all metrics, also while no engine counts."""
        return iter(_families({"model_name": "", "engine": ""}, []))

    def collect(self) -> Iterator[Metric]:
        engines = {tuple(labels.values()): (labels, found) for labels, found in self._engines.values()}
        counting = [(labels, found) for labels, found in engines.values() if found.total("opened")]
        if counting:
            yield from _families(counting[0][0], counting)


def _families(names: Mapping[str, str], engines: Sequence[tuple[dict[str, str], Counters]]) -> list[Metric]:
    labels = list(names)
    nodes = HistogramMetricFamily("clover:tree_nodes", "Nodes verified per tree.", labels=labels)
    for own, found in engines:
        cumulative = np.cumsum(found.sizes).tolist()
        buckets = [(str(float(size)), count) for size, count in enumerate(cumulative)]
        total = float((np.arange(len(found.sizes)) * found.sizes).sum())
        nodes.add_metric(list(own.values()), [*buckets, ("+Inf", cumulative[-1])], total)
    families: list[Metric] = [nodes]
    for name, text, total_name in (
        ("clover:promised_tokens", "Accepted nodes that the head expected (joint probability).", "promised"),
        ("clover:first_node_accepted", "Trees whose likeliest node was accepted.", "first"),
    ):
        family = CounterMetricFamily(name, text, labels=labels)
        for own, found in engines:
            family.add_metric(list(own.values()), found.total(total_name))
        families.append(family)
    for name, text, label, keys, attribute in (
        ("clover:drafted_depth", "Trees that reach a depth.", "depth", None, "drafted"),
        ("clover:accepted_depth", "Trees accepted to a depth.", "depth", None, "accepted"),
        ("clover:step_seconds", "Seconds per part of a step.", "part", PARTS, "seconds"),
        ("clover:fallbacks", "Requests with less speculation.", "reason", REASONS, "fallbacks"),
    ):
        family = CounterMetricFamily(name, text, labels=[*labels, label])
        for own, found in engines:
            for i, number in enumerate(getattr(found, attribute).tolist()):
                family.add_metric([*own.values(), keys[i] if keys else str(i + 1)], number)
        families.append(family)
    return families


_collector = CounterCollector()
_registered: list[Collector] = []


def export_counters(config: Any, model_name: str, engines: int) -> str:
    """Make the counters files of a configuration and export them while it lives; for the front end.

    Args:
        config: the `CloverSpeculativeConfig`.
        model_name: label of the metrics, as vLLM's own have it.
        engines: data-parallel ranks.

    Returns:
        path of the files less their rank, for `counters_path`; empty where none can be made.
    """
    num_nodes: int = config.num_speculative_tokens
    try:
        descriptor, base = tempfile.mkstemp(prefix="clover-", suffix=".counters")
        os.close(descriptor)
        weakref.finalize(config, Path(base).unlink, missing_ok=True)
        for engine in range(engines):
            path = Path(counters_path(base, engine))
            path.write_bytes(bytes(8 * sum(_sizes(num_nodes))))
            labels = {"model_name": model_name, "engine": str(engine)}
            _collector.add(str(path), labels, Counters(num_nodes, str(path)))
            weakref.finalize(config, path.unlink, missing_ok=True)
            weakref.finalize(config, _collector.remove, str(path))
    except OSError as error:
        logger.warning("Clover-2 exports no metrics of its own: %s.", error)
        return ""
    if not _registered:
        REGISTRY.register(_collector)
        _registered.append(_collector)
    return base


def counters_path(base: str, engine: int) -> str:
    """File of an engine's counters; `engine` is its data-parallel rank."""
    return f"{base}.{engine}" if base else ""


def _sizes(num_nodes: int) -> tuple[int, ...]:
    return (len(_TOTALS), num_nodes + 1, num_nodes, num_nodes, len(PARTS), len(REASONS))
