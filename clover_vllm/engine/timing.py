"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Adds up host seconds per part of a step; on a GPU these are launch times.

    A part measured inside another counts for itself only.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []  # seconds of parts inside the running ones

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        self._inner.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            own = elapsed - self._inner.pop()
            self.seconds[part] = self.seconds.get(part, 0.0) + own
            if self._inner:
                self._inner[-1] += elapsed
