"""Kinds of nodes: where a node of an adaptive tree comes from, and how deep it is. Calibration tells them apart."""

from __future__ import annotations

import numpy as np

from clover_vllm.tree.budget import Bools, Floats, Ints

DEPTHS = 8
"""Depths that have an intercept of their own; deeper nodes share the last."""

MATCHES = (1, 2, 4, 8, 16)
"""Lengths of a match from which on retrieved nodes have intercepts of their own."""

MATCH_DEPTHS = 4

SOURCES = ("head", "retrieved", "both")
"""Where nodes come from: the head, earlier text, or either by itself."""

_FIRST = (0, DEPTHS, DEPTHS + len(MATCHES) * MATCH_DEPTHS)
KINDS = _FIRST[2] + len(MATCHES)
"""Of the head by depth, retrieved by length of the match and depth, and of both by match."""

SOURCE_OF = np.searchsorted(_FIRST, np.arange(KINDS), side="right") - 1
"""By kind, its place in `SOURCES`."""


def come_from(source: str, kinds: Ints) -> Bools:
    """Which of these kinds are of one of `SOURCES`."""
    return np.equal(SOURCE_OF[kinds], SOURCES.index(source))


def place_of_match(length: int) -> int:
    """Of a match's length, in `MATCHES`."""
    return sum(length >= bound for bound in MATCHES[1:])


def of_head(depth: Ints) -> Ints:
    """Of nodes that the head proposes."""
    return np.minimum(depth, DEPTHS) - 1


def of_retrieved(match: Ints, depth: Ints) -> Ints:
    """Of nodes that follow in an earlier text, by place of the match."""
    return _FIRST[1] + match * MATCH_DEPTHS + np.minimum(depth, MATCH_DEPTHS) - 1


def of_both(match: Ints) -> Ints:
    """Of retrieved nodes that the head proposes too."""
    return _FIRST[2] + match


def first_intercepts() -> Floats:
    """Where calibration starts, by what retrieved nodes were worth on prompts that no figure comes from.

    The suffix cache counts the end of the text itself as an occurrence after which nothing follows: its shares are too
    low at depth 1. Behind that they are too high, since one occurrence is no certainty. A node on which both agree is
    likelier than the head says.
    """
    start = np.zeros(KINDS)
    for match in range(len(MATCHES)):
        deeper = np.arange(2, MATCH_DEPTHS + 1)
        start[of_retrieved(np.array([match]), np.array([1]))] = -1.6 + match
        start[of_retrieved(np.full(len(deeper), match), deeper)] = -4.3 + 1.1 * match
    start[SOURCES.index("both") == SOURCE_OF] = 0.5
    return start
