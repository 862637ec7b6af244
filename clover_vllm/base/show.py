"""Tables on the console: as wide as their text, so that no number is cut."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_UNLIMITED = 10_000


def print_table(table: Table) -> None:
    """Print a table in its natural width, also where output is a file, a pipe or a narrow terminal.

    rich would fit it to 80 columns there and replace what does not fit by dots.
    """
    needed = Console(width=_UNLIMITED).measure(table).maximum
    Console(width=max(Console().width, needed)).print(table)
