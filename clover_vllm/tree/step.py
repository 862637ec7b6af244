"""Which draft trees a step verifies: small host-side records between proposer, runner and scorer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite

from clover_vllm.tree import ROOT, DraftTrees


@dataclass(frozen=True)
class RequestTree:
    """One request's draft tree on the host, parents first (made by the proposer)."""

    tokens: list[int]
    parents: list[int]  # index or ROOT
    depths: list[int]  # 1 under the root
    masks: list[int]  # of the node rows: bit j, the request's row j is visible (64th bit: the sign)
    is_chain: bool
    probabilities: Sequence[float] = ()  # joint, as the head sees them; empty where it does not say

    @classmethod
    def chain(cls, tokens: list[int], probabilities: Sequence[float] = ()) -> RequestTree:
        """A single path."""
        count = len(tokens)
        masks = [(1 << (i + 2)) - 1 for i in range(count)]
        return cls(
            tokens, list(range(-1, count - 1)), list(range(1, count + 1)), signed(masks), True, probabilities
        )

    @classmethod
    def make(
        cls, tokens: list[int], parents: list[int], depths: list[int], probabilities: Sequence[float] = ()
    ) -> RequestTree:
        """From nodes in parent-first order."""
        masks: list[int] = []
        for node, parent in enumerate(parents):
            masks.append((1 if parent == ROOT else masks[parent]) | 1 << (node + 1))
        return cls(tokens, parents, depths, signed(masks), _is_chain(parents), probabilities)

    @classmethod
    def from_batch(cls, trees: DraftTrees) -> list[RequestTree]:
        """The trees of a batch; one with a probability that is no number is left out whole.

        Their masks are those of `tree.ancestor_bits`.
        """
        offsets = trees.offsets.tolist()
        tokens, parents, depths = trees.tokens.tolist(), trees.parents.tolist(), trees.depths.tolist()
        joint = trees.log_probs.exp().tolist()
        found = []
        for a, b in pairwise(offsets):
            b = b if all(map(isfinite, joint[a:b])) else a
            found.append(cls.make(tokens[a:b], parents[a:b], depths[a:b], joint[a:b]))
        return found

    def prefix(self, count: int) -> RequestTree:
        """The first nodes, which again are a tree."""
        if count == len(self.tokens):
            return self
        return RequestTree(
            self.tokens[:count],
            self.parents[:count],
            self.depths[:count],
            self.masks[:count],
            _is_chain(self.parents[:count]),
            self.probabilities[:count],
        )

    def likeliest_chain(self) -> RequestTree:
        """The path of first children; a tree's nodes stand in falling order of probability."""
        path: list[int] = []
        current = ROOT
        for node, parent in enumerate(self.parents):
            if parent == current:
                path.append(node)
                current = node
        probabilities = [self.probabilities[node] for node in path] if self.probabilities else ()
        return RequestTree.chain([self.tokens[node] for node in path], probabilities)


def _is_chain(parents: list[int]) -> bool:
    return parents == list(range(-1, len(parents) - 1))


def signed(masks: Sequence[int]) -> list[int]:
    """64-bit masks as int64 values."""
    return [mask - (1 << 64) if mask >> 63 else mask for mask in masks]


def causal_masks(rows: int) -> list[int]:
    """Masks of the rows of a request that decodes or prefills: each sees those up to itself."""
    return signed([(1 << (row + 1)) - 1 for row in range(rows)])


@dataclass(frozen=True)
class Ending:
    """Which token ends a request, as `vllm.v1.core.sched.utils.check_stop`."""

    tokens: frozenset[int] = frozenset()
    remaining: int = sys.maxsize  # tokens until max_tokens or max_model_len
    repeats: Callable[[Sequence[int]], bool] | None = None  # repetition detection, given the step's tokens

    def at(self, emitted: Sequence[int]) -> bool:
        """Whether the last of `emitted`, the tokens of the step so far, is the request's last."""
        return (
            len(emitted) >= self.remaining
            or emitted[-1] in self.tokens
            or (self.repeats is not None and self.repeats(emitted))
        )


NEVER = Ending()


@dataclass
class StepTrees:
    """What a step verifies, in the order of the batch (filled by the runner before the forward)."""

    trees: list[RequestTree | None]  # None: no drafts for this request in this step
    rows: list[int]  # rows of each request in the step
    first_rows: list[int]  # index of its first row
    endings: Mapping[int, Ending] = field(default_factory=dict)  # by request; none: no token ends it
    accepted: list[list[int]] = field(default_factory=list)  # nodes by depth, filled by the scorer

    @property
    def has_branches(self) -> bool:
        """Whether any tree is more than a chain, so that the step needs masks."""
        return any(tree is not None and not tree.is_chain for tree in self.trees)

    def moves(self) -> tuple[list[int], list[int]]:
        """Rows that accepted nodes lie in and rows right behind the root that they belong in, where those differ.

        Sources never precede their destinations (`tree.masks.accepted_moves`).
        """
        sources: list[int] = []
        destinations: list[int] = []
        for r, nodes in enumerate(self.accepted):
            root = self.root_row(r)
            for depth, node in enumerate(nodes):
                if node != depth:
                    sources.append(root + 1 + node)
                    destinations.append(root + 1 + depth)
        return sources, destinations

    @property
    def decodes_only(self) -> bool:
        """Whether no request has more rows than its root and its drafts."""
        return all(self.root_row(r) == first for r, first in enumerate(self.first_rows))

    def root_row(self, request: int) -> int:
        """Index of the row of a request's root; drafts are the request's last rows."""
        tree = self.trees[request]
        return self.first_rows[request] + self.rows[request] - 1 - (len(tree.tokens) if tree else 0)
