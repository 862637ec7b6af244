"""What came of the nodes that an adaptive step has verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from clover_vllm.tree.budget import Bools, Floats, Ints
from clover_vllm.tree.draft import ROOT, Tree
from clover_vllm.tree.kinds import come_from


@dataclass(frozen=True)
class Outcomes:
    """Of all nodes of trees that tell their signals, each [N]."""

    requests: Ints
    kinds: Ints
    odds: Floats
    accepted: Bools
    tested: Bools  # whether their parents were accepted

    @classmethod
    def of(cls, trees: Sequence[Tree | None], accepted: Sequence[Sequence[int]]) -> Outcomes:
        """
        Args:
            trees: by request. Those that have no signals, such as what the scheduler pads, are left out.
            accepted: nodes, by request.
        """
        own = [(r, tree) for r, tree in enumerate(trees) if tree is not None and tree.signals]
        sizes = np.array([len(tree.tokens) for _, tree in own], np.int64)
        starts = np.cumsum(sizes) - sizes
        parents = np.array([*chain.from_iterable(tree.parents for _, tree in own)], np.int64)
        signals = np.array([*chain.from_iterable(tree.signals for _, tree in own)], np.float64).reshape(-1, 2)
        came = np.zeros(len(parents), bool)
        came[
            [first + node for first, (r, _) in zip(starts.tolist(), own, strict=True) for node in accepted[r]]
        ] = True
        tested = (parents == ROOT) | came[parents + np.repeat(starts, sizes)]
        requests = np.repeat(np.array([r for r, _ in own], np.int64), sizes)
        return cls(requests, signals[:, 0].astype(np.int64), signals[:, 1], came, tested)

    def count(self, source: str) -> tuple[int, int]:
        """Nodes of a source, and how many of them were accepted."""
        own = come_from(source, self.kinds)
        return int(own.sum()), int(self.accepted[own].sum())
