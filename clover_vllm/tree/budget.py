"""How many draft nodes a step should verify, over the whole batch.

A step costs milliseconds for its rows and earns tokens: one per request that samples, and each accepted node. Nodes of
all requests compete: sorted by the probability that they are accepted, any prefix of that order is a set of trees,
since a child is never likelier than its parent. The best prefix has the highest tokens per millisecond. A request
whose text is easy gets many nodes, a hard one none. What is chosen can never change the text: the target samples at
every node, and trees are chosen before it runs.
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
    """The best number of nodes, and what that means for a further one."""

    nodes: int
    rate: float  # expected tokens per millisecond
    price: float  # probability that a further node needs to pay for its row


def choose_budget(gains: Floats, sampling: float, milliseconds: Floats, spent: float = 0.0) -> Budget:
    """The number of nodes with the most expected tokens per millisecond.

    Args:
        gains: [N], probabilities that nodes are accepted, falling.
        sampling: requests that sample a token whatever is drafted.
        milliseconds: [N + 1] or more, of a step that verifies 0, 1, 2, ... nodes, never falling.
        spent: milliseconds of drafting, which are added to all.
    """
    tokens = sampling + np.concatenate(([0.0], np.cumsum(gains)))
    rates = tokens / (milliseconds[: len(tokens)] + spent)
    best = int(np.argmax(rates))
    after = min(best + PRICED_ROWS, len(milliseconds) - 1)
    slope = float(milliseconds[after] - milliseconds[best]) / max(1, after - best)
    return Budget(best, float(rates[best]), float(rates[best]) * slope)
