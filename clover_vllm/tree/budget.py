"""How many draft nodes a step should verify, over the whole batch.

A step costs milliseconds for its rows and earns tokens: one per request that samples, and each accepted node. What is
sought is the highest geometric mean of the requests' speeds (proportional fairness: Kelly, 1997), so that a step that
easy texts make longer has to pay for hard ones too. A node adds to the logarithm of what its request gets in the step,
its worth: the less, the more the request has already. Nodes of all requests compete: sorted by worth, any prefix of that
order is a set of trees, since a child is never likelier than its parent. What is chosen can never change the text: the
target samples at every node, and trees are chosen before it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

PRICED_ROWS = 4
"""Rows beyond the chosen ones over which the price of a further node is averaged, since costs rise in stairs."""


@dataclass(frozen=True)
class Budget:
    """The best number of nodes, and what that means for more."""

    nodes: int
    speed: float  # logarithm of the geometric mean of the requests' tokens per millisecond
    rate: float  # worth that a further millisecond needs to pay for itself
    price: float  # worth that a further node needs


def starts_of(requests: Ints) -> tuple[Ints, Ints]:
    """Of nodes that stand request by request, [N]: where each request's begin, and how many it has."""
    changed = np.concatenate(([True], requests[1:] != requests[:-1]))[: len(requests)]
    starts = np.flatnonzero(changed)
    return starts, np.diff(np.append(starts, len(requests)))


def worths(gains: Floats, requests: Ints, sure: float = 1.0) -> Floats:
    """What nodes add to the logarithm of their requests' tokens, after the nodes before them, [N].

    Args:
        gains: [N], probabilities that nodes are accepted, falling within a request.
        requests: [N], of the nodes, which stand request by request.
        sure: tokens that a request gets without these nodes.
    """
    starts, counts = starts_of(requests)
    before = np.cumsum(gains) - gains
    return np.log1p(gains / (sure + before - np.repeat(before[starts], counts)))


def choose_budget(worth: Floats, sampling: float, milliseconds: Floats, spent: float = 0.0) -> Budget:
    """The number of nodes with the highest geometric mean of speeds.

    Args:
        worth: [N], of nodes, falling.
        sampling: requests that sample a token whatever is drafted.
        milliseconds: [N + 1] or more, of a step that verifies 0, 1, 2, ... nodes, never falling.
        spent: milliseconds of drafting, which are added to all.
    """
    taken = milliseconds[: len(worth) + 1] + spent
    speeds = np.concatenate(([0.0], np.cumsum(worth))) / sampling - np.log(taken)
    best = int(np.argmax(speeds))
    rate = sampling / float(taken[best])
    after = min(best + PRICED_ROWS, len(milliseconds) - 1)
    slope = float(milliseconds[after] - milliseconds[best]) / max(1, after - best)
    return Budget(best, float(speeds[best]), rate, rate * slope)
