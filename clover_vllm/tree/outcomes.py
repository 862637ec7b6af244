"""What came of candidates and of verified nodes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from clover_vllm.tree.budget import Bools, Floats, Ints
from clover_vllm.tree.draft import Tree
from clover_vllm.tree.kinds import SOURCE_OF, SOURCES


class Outcomes(NamedTuple):
    """Of the candidates whose parents the target has said, verified or not, each [N]."""

    requests: Ints
    kinds: Ints
    odds: Floats
    said: Bools  # whether the target has said the candidate too


def count_sources(trees: Sequence[Tree | None], accepted: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """Verified nodes by source, and of those the accepted ones, each [len(SOURCES)].

    Args:
        trees: by request. Those that do not tell their nodes' kinds, such as what the scheduler pads, are left out.
        accepted: nodes, by request.
    """
    own = [(tree.kinds, nodes) for tree, nodes in zip(trees, accepted, strict=True) if tree and tree.kinds]
    return (
        _by_source([*chain.from_iterable(kinds for kinds, _ in own)]),
        _by_source([kinds[node] for kinds, nodes in own for node in nodes]),
    )


def _by_source(kinds: Sequence[int]) -> Ints:
    return np.bincount(SOURCE_OF[np.array(kinds, np.int64)], minlength=len(SOURCES))
