"""What a long command has done and what is left: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Item = TypeVar("Item")

QUIET_SECONDS = 30.0
"""Lines in a log file are at least so far apart, but for the first and the last."""


class Work:
    """Progress on stderr; used as a context manager.

    rich draws bars on terminals only. In a log file there would be nothing to see for as long as a command runs.
    """

    def __init__(
        self, unit: str, total: int | None, quiet: float = QUIET_SECONDS, console: Console | None = None
    ) -> None:
        """
        Args:
            unit: what is counted, in the plural ("answers").
            total: how many there are; None if time decides.
            quiet: seconds between lines where stderr is not a terminal.
            console: instead of stderr.
        """
        self._console = console or Console(stderr=True)
        self._unit, self._total, self._quiet = unit, total, quiet
        self._done, self._doing = 0, ""
        self._started = time.monotonic()
        self._printed: float | None = None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(unit, total=total)

    def doing(self, what: str) -> None:
        """Say what is being done, from now on."""
        self._doing = what
        self._bar.update(self._task, description=what)
        self._line()

    def advance(self, count: int = 1) -> None:
        """More are done, one by default."""
        self._done += count
        self._bar.update(self._task, completed=self._done)
        self._line(last=self._done == self._total)

    def __enter__(self) -> Work:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def _line(self, last: bool = False) -> None:
        now = time.monotonic()
        early = self._printed is not None and now - self._printed < self._quiet
        if self._console.is_terminal or (early and not last):
            return
        self._printed = now
        parts = [f"{self._done:,} of {self._total:,} {self._unit}" if self._total else self._count()]
        if self._doing:
            parts.append(self._doing)
        elapsed = now - self._started
        parts.append(f"{_clock(elapsed)} elapsed")
        if self._total and 0 < self._done < self._total:
            parts.append(f"about {_clock(elapsed / self._done * (self._total - self._done))} left")
        self._console.print("; ".join(parts), highlight=False, markup=False, soft_wrap=True)

    def _count(self) -> str:
        return f"{self._done:,} {self._unit}"


def each(items: Sequence[Item], unit: str, doing: str = "") -> Iterator[Item]:
    """The items, one after the other, with progress."""
    with Work(unit, len(items)) as work:
        if doing:
            work.doing(doing)
        for item in items:
            yield item
            work.advance()


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
