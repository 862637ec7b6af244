"""Which draft trees a step verifies: small host-side records between proposer, runner and scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from clover_vllm.tree import ROOT, DraftTrees, ancestor_bits
from clover_vllm.tree.masks import row_offsets


@dataclass(frozen=True)
class RequestTree:
    """One request's draft tree on the host, parents first (made by the proposer)."""

    tokens: list[int]
    parents: list[int]  # index or ROOT
    depths: list[int]  # 1 under the root
    masks: list[int]  # of the node rows: bit j, the request's row j is visible (64th bit: the sign)
    is_chain: bool

    @classmethod
    def chain(cls, tokens: list[int]) -> RequestTree:
        """A single path."""
        count = len(tokens)
        masks = [(1 << (i + 2)) - 1 for i in range(count)]
        return cls(tokens, list(range(-1, count - 1)), list(range(1, count + 1)), signed(masks), True)

    @classmethod
    def from_batch(cls, trees: DraftTrees) -> list[RequestTree]:
        """The trees of a batch, one transfer per tensor."""
        offsets, rows = trees.offsets.tolist(), row_offsets(trees).tolist()
        tokens, parents = trees.tokens.tolist(), trees.parents.tolist()
        depths, masks = trees.depths.tolist(), ancestor_bits(trees).tolist()
        made = []
        for r in range(trees.num_requests):
            first, last = offsets[r], offsets[r + 1]
            own = parents[first:last]
            made.append(
                cls(
                    tokens[first:last],
                    own,
                    depths[first:last],
                    masks[rows[r] + 1 : rows[r + 1]],
                    own == list(range(-1, last - first - 1)),
                )
            )
        return made

    def prefix(self, count: int) -> RequestTree:
        """The first nodes, which again are a tree."""
        if count == len(self.tokens):
            return self
        return RequestTree(
            self.tokens[:count],
            self.parents[:count],
            self.depths[:count],
            self.masks[:count],
            self.parents[:count] == list(range(-1, count - 1)),
        )

    def likeliest_chain(self) -> RequestTree:
        """The path of first children; a tree's nodes stand in falling order of probability."""
        tokens: list[int] = []
        current = ROOT
        for node, parent in enumerate(self.parents):
            if parent == current:
                tokens.append(self.tokens[node])
                current = node
        return RequestTree.chain(tokens)


def signed(masks: Sequence[int]) -> list[int]:
    """64-bit masks as int64 values."""
    return [mask - (1 << 64) if mask >> 63 else mask for mask in masks]


def causal_masks(rows: int) -> list[int]:
    """Masks of the rows of a request that decodes or prefills: each sees those up to itself."""
    return signed([(1 << (row + 1)) - 1 for row in range(rows)])


@dataclass
class StepTrees:
    """What a step verifies, in the order of the batch (filled by the runner before the forward)."""

    trees: list[RequestTree | None]  # None: no drafts for this request in this step
    rows: list[int]  # rows of each request in the step
    first_rows: list[int]  # index of its first row
    accepted: list[list[int]] = field(default_factory=list)  # nodes by depth, filled by the scorer

    @property
    def has_branches(self) -> bool:
        """Whether any tree is more than a chain, so that the step needs masks."""
        return any(tree is not None and not tree.is_chain for tree in self.trees)

    def root_row(self, request: int) -> int:
        """Index of the row of a request's root; drafts are the request's last rows."""
        tree = self.trees[request]
        return self.first_rows[request] + self.rows[request] - 1 - (len(tree.tokens) if tree else 0)
