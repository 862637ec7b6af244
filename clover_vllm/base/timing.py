"""Where a step's time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Adds up host seconds per part of the steps that only decode; on a GPU these are launch times.

    A part measured inside another counts for itself only. Steps with prompt chunks are left out:
    their cost depends on the prompts.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._step: dict[str, float] = {}
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
            self._step[part] = self._step.get(part, 0.0) + own
            if self._inner:
                self._inner[-1] += elapsed

    def finish_step(self, decode_only: bool) -> dict[str, float]:
        """The parts measured since the last call; added to `seconds` only if the step only decodes."""
        if decode_only:
            for part, seconds in self._step.items():
                self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        step, self._step = self._step, {}
        return step
