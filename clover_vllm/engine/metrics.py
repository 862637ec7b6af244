"""Counters of Clover's own, beside vLLM's `vllm:spec_decode_*`.

vLLM's worker has no way to send numbers of a plugin to the process that answers /metrics. So the process
that makes the configuration makes a small file, the worker maps it into memory and counts in it, and the
front end maps it too and reads it when asked. The front end's part is a stat logger, which vLLM loads from
the entry point `vllm.stat_logger_plugins`. A worker on another host counts for itself, and with several
API server processes vLLM exports no metrics but its own: ours are not there then.
"""

from __future__ import annotations

import atexit
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.prometheus import get_prometheus_registry

from clover_vllm.engine.step import StepTrees

logger = init_logger("vllm.clover")

PARTS = ("verify", "sample", "move", "draft", "python")
"""Parts of a step whose seconds are counted (see `engine.timing`)."""

REASONS = ("structured_output", "unknown_draft", "non_finite_draft")
"""Why a request got a chain or no draft in a step."""

MIN_DRAFTS = 500
"""Drafts after which acceptance is judged."""

POOR_SHARE = 0.5
"""Acceptance below this share of what the head's config promises is warned of."""


def make_counters(num_nodes: int, engines: int) -> str:
    """Make the counters files of an engine and its data-parallel ranks; they go when this process ends.

    Returns:
        their name, for `counters_path`.
    """
    name = f"clover-{uuid.uuid4().hex}"
    for engine in range(engines):
        path = counters_path(name, engine)
        path.write_bytes(bytes(8 * sum(_sizes(num_nodes))))
        atexit.register(path.unlink, missing_ok=True)
    return name


def _sizes(num_nodes: int) -> tuple[int, ...]:
    return (3, num_nodes + 1, num_nodes, num_nodes, len(PARTS), len(REASONS))


def counters_path(name: str, engine: int) -> Path:
    """Where an engine's counters lie; `engine` is its data-parallel rank."""
    return Path(tempfile.gettempdir()) / f"{name}-{engine}.counters"


class Counters:
    """Numbers that only grow, in a file or in memory.

    Attributes:
        drafts: trees verified.
        promised: accepted nodes that the head expected, the sum of its joint probabilities.
        first: trees whose likeliest node was accepted.
        sizes: [num_nodes + 1], trees by number of nodes verified.
        drafted, accepted: [num_nodes], trees that reached, and that were accepted to, depth i + 1.
        seconds: [len(PARTS)].
        fallbacks: [len(REASONS)].
    """

    def __init__(self, num_nodes: int, path: Path | None = None, *, write: bool = False) -> None:
        """
        Args:
            num_nodes: most nodes per tree.
            path: file to map, from `make_counters`; None, or one that is not on this host: in memory.
            write: whether to count rather than to read.
        """
        sizes = _sizes(num_nodes)
        if path is None or not path.exists():
            values = np.zeros(sum(sizes))
        else:
            values = np.memmap(path, dtype=np.float64, mode="r+" if write else "r", shape=(sum(sizes),))
        self.totals, self.sizes, self.drafted, self.accepted, self.seconds, self.fallbacks = np.split(
            values, np.cumsum(sizes)[:-1]
        )

    @property
    def drafts(self) -> float:
        return float(self.totals[0])

    @property
    def promised(self) -> float:
        return float(self.totals[1])

    @property
    def first(self) -> float:
        return float(self.totals[2])

    def count_step(self, step: StepTrees, seconds: Mapping[str, float]) -> None:
        """Add a finished step."""
        for tree, nodes in zip(step.trees, step.accepted, strict=False):
            if tree is None:
                continue
            self.totals += (1, sum(tree.probabilities), bool(nodes) and nodes[0] == 0)
            self.sizes[len(tree.tokens)] += 1
            self.drafted[: max(tree.depths)] += 1
            self.accepted[: len(nodes)] += 1
        for i, part in enumerate(PARTS):
            self.seconds[i] += seconds.get(part, 0.0)

    def count_fallback(self, reason: str) -> None:
        """Add a request that got a chain or no draft for one of `REASONS`."""
        self.fallbacks[REASONS.index(reason)] += 1


class CounterCollector(Collector):
    """An engine's counters as Prometheus metrics."""

    def __init__(self, counters: Counters, labels: Mapping[str, str]) -> None:
        self._counters = counters
        self._labels = dict(labels)

    def collect(self) -> Iterator[Metric]:
        found = self._counters
        names, values = list(self._labels), list(self._labels.values())
        sizes = found.sizes.tolist()
        cumulative = np.cumsum(sizes).tolist()
        nodes = HistogramMetricFamily("clover:tree_nodes", "Nodes verified per tree.", labels=names)
        buckets = [(str(float(size)), count) for size, count in enumerate(cumulative)]
        total = sum(size * count for size, count in enumerate(sizes))
        nodes.add_metric(values, [*buckets, ("+Inf", cumulative[-1])], total)
        yield nodes
        for name, text, number in (
            ("clover:promised_tokens", "Accepted nodes that the head expected (joint probability).", 1),
            ("clover:first_node_accepted", "Trees whose likeliest node was accepted.", 2),
        ):
            family = CounterMetricFamily(name, text, labels=names)
            family.add_metric(values, float(found.totals[number]))
            yield family
        for name, text, label, keys, numbers in (
            ("clover:drafted_depth", "Trees that reach a depth.", "depth", None, found.drafted),
            ("clover:accepted_depth", "Trees accepted to a depth.", "depth", None, found.accepted),
            ("clover:step_seconds", "Seconds per part of a step.", "part", PARTS, found.seconds),
            ("clover:fallbacks", "Requests with less speculation.", "reason", REASONS, found.fallbacks),
        ):
            family = CounterMetricFamily(name, text, labels=[*names, label])
            for i, number in enumerate(numbers.tolist()):
                family.add_metric([*values, keys[i] if keys else str(i + 1)], number)
            yield family


_registered: dict[int, tuple[CollectorRegistry, CounterCollector]] = {}


class CloverStatLogger(StatLoggerBase):
    """Exports an engine's counters and logs them with vLLM's; does nothing without Clover-2."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        from clover_vllm.engine.config import CloverSpeculativeConfig

        spec = vllm_config.speculative_config
        self._counters: Counters | None = None
        self._logged: np.ndarray[Any, np.dtype[np.float64]] | None = None
        self._warned = False
        if not isinstance(spec, CloverSpeculativeConfig):
            return
        self._promise: float | None = spec.draft_model_config.hf_config.first_acceptance
        self._counters = Counters(spec.num_speculative_tokens, counters_path(spec.counters, engine_index))
        names = {"model_name": str(vllm_config.model_config.served_model_name), "engine": str(engine_index)}
        collector = CounterCollector(self._counters, names)
        registry = get_prometheus_registry()
        if engine_index in _registered:  # a process may build one engine after the other
            before, former = _registered.pop(engine_index)
            before.unregister(former)
        registry.register(collector)
        _registered[engine_index] = (registry, collector)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the worker counts."""

    def log_engine_initialized(self) -> None:
        """Nothing."""

    def log(self) -> None:
        """What happened since the last call, if anything."""
        found = self._counters
        if found is None:
            return
        now = np.concatenate([found.totals, found.drafted, found.accepted, found.seconds])
        since = now if self._logged is None else now - self._logged
        self._logged = now
        drafts, promised, _ = since[:3].tolist()
        if not drafts:
            return
        nodes = len(found.drafted)
        drafted, accepted, seconds = np.split(since[3:], [nodes, 2 * nodes])
        logger.info(
            "Clover-2: %.2f tokens per draft (the head expected %.2f), acceptance by depth %s, seconds %s.",
            1 + accepted.sum() / drafts,
            1 + promised / drafts,
            " ".join(f"{a / d:.2f}" for a, d in zip(accepted, drafted, strict=True) if d),
            " ".join(f"{part} {value:.2f}" for part, value in zip(PARTS, seconds, strict=True)),
        )
        self._warn(found)

    def _warn(self, found: Counters) -> None:
        if self._warned or self._promise is None or found.drafts < MIN_DRAFTS:
            return
        if found.first < POOR_SHARE * self._promise * found.drafts:
            self._warned = True
            logger.warning(
                "Clover-2: the likeliest draft token was right in %.0f%% of %d drafts, where the head's config "
                "promises %.0f%%; is it the head of this target, and do requests use the chat template?",
                100 * found.first / found.drafts,
                found.drafts,
                100 * self._promise,
            )
