"""Counters of engines inside Ray actors, through Ray's metrics: nobody reads such a process's own registry.

A replica of Ray Serve, or an actor of Ray Data, makes the configuration and with it the folder in which its worker
counts (`engine.metrics`). A thread adds what has been gained since to counters of Ray's, which appear as
`ray_clover_...` on the metrics port of the node, beside vLLM's own `ray_vllm_...`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import MultiProcessCollector
from vllm.logger import init_logger
from vllm.ray.lazy_utils import is_in_ray_actor

logger = init_logger("vllm.clover")

EVERY = 5.0
"""Seconds between two looks at the files."""


class Gains:
    """What the files of a folder have gained since the last look, for counters of another kind."""

    def __init__(self, folder: str, counter: Callable[..., Any]) -> None:
        """
        Args:
            folder: from `export_counters`.
            counter: class of counters with prometheus_client's interface.
        """
        self._folder = Path(folder)
        self._counter = counter
        self._made: dict[str, Any] = {}
        self._seen: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def push(self) -> None:
        """Add them."""
        files = [str(file) for file in sorted(self._folder.glob("*.db"))]
        for family in MultiProcessCollector.merge(files):
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                gained = sample.value - self._seen.get(key, 0.0)
                self._seen[key] = sample.value
                if gained > 0:
                    self._of(sample.name, family.documentation, list(sample.labels)).labels(
                        **sample.labels
                    ).inc(gained)

    def _of(self, name: str, text: str, labels: list[str]) -> Any:
        if name not in self._made:
            # Exporters add "_total" to the names of counters.
            self._made[name] = self._counter(name.removesuffix("_total"), text, labels)
        return self._made[name]


def push_to_ray(folder: str) -> None:
    """Where this process is a Ray actor, push the counters of a folder to Ray until the folder is gone."""
    if not is_in_ray_actor():
        return
    from vllm.v1.metrics.ray_wrappers import RayCounterWrapper

    gains = Gains(folder, RayCounterWrapper)

    def keep_pushing() -> None:
        while not pause.wait(EVERY) and gains._folder.is_dir():
            try:
                gains.push()
            except Exception as error:  # metrics must not end an engine
                logger.warning("Clover-2 cannot push its metrics to Ray: %s.", error)
                return

    pause = threading.Event()
    threading.Thread(target=keep_pushing, name="clover-ray-metrics", daemon=True).start()
