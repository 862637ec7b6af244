"""What the docs say is drafted for a request."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path


@cache
def documented(column: str = "draft") -> dict[str, str]:
    """What is drafted, by sampling parameter and by test, as the docs have it.

    Args:
        column: "draft", or "on a GPU".

    Returns:
        "tree", "chain", "none" or "not run".
    """
    text = (Path(__file__).parents[2] / "docs/compatibility.md").read_text()
    head, _, *rows = text[text.index("| request feature |") :].partition("\n\n")[0].splitlines()
    place = head.strip("| ").split(" | ").index(column)
    cells = [row.strip("| ").split(" | ") for row in rows]
    return {name: own[place] for own in cells for name in re.findall(r"`(\w+)`", f"{own[0]} {own[-1]}")}
