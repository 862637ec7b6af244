"""Sizes of models, and ways to decode with trees of which a known path is accepted."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from clover_vllm.tree.shapes import Shape, chain


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama and of its head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    wide: int  # of the gated MLP
    vocab: int
    draft_vocab: int
    dtype: str


MODELS = {
    "8b": ModelShape(4096, 32, 32, 8, 14336, 128_256, 32_768, "bfloat16"),  # Llama-3-8B
    "tiny": ModelShape(64, 2, 2, 1, 96, 320, 128, "float32"),
}

RANK_SHARES = (0.6, 0.2, 0.1, 0.05, 0.03, 0.02)
"""How likely a node's children are, by rank; they shape the trees, and nothing else."""


def tree_shape(nodes: int, deepest: int) -> Shape:
    """The likeliest nodes where every node's children are as likely as RANK_SHARES says."""
    open_paths: list[tuple[float, tuple[int, ...]]] = [
        (-share, (rank,)) for rank, share in enumerate(RANK_SHARES)
    ]
    heapq.heapify(open_paths)
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < nodes:
        score, path = heapq.heappop(open_paths)
        chosen.append(path)
        if len(path) < deepest:
            for rank, share in enumerate(RANK_SHARES):
                heapq.heappush(open_paths, (score * share, (*path, rank)))
    return Shape(chosen)


@dataclass(frozen=True)
class ForcedMethod:
    """How an engine decodes.

    Args:
        nodes: of each tree; 0: plain decoding.
        accepted: nodes that are accepted, in turn; nothing is learnt from them.
        is_chain: one path.
    """

    nodes: int
    accepted: tuple[int, ...] = ()
    is_chain: bool = False

    @property
    def rounds(self) -> int:
        """Levels of drafting."""
        return self.nodes if self.is_chain else min(self.nodes, 4 if self.nodes <= 8 else 6)

    @property
    def shape(self) -> Shape:
        return chain(self.nodes) if self.is_chain else tree_shape(self.nodes, self.rounds)

    def __str__(self) -> str:
        return "plain" if not self.nodes else f"{'chain' if self.is_chain else 'tree'} of {self.nodes}"


@dataclass(frozen=True)
class Models:
    """A target without weights, and a head, of a shape."""

    shape: str  # of MODELS
    target: str  # folder
    head: str

    @property
    def is_tiny(self) -> bool:
        return self.shape == "tiny"

    @property
    def dtype(self) -> str:
        return MODELS[self.shape].dtype


METHODS = (
    ForcedMethod(0),
    ForcedMethod(16, (3, 2, 4, 1)),
    ForcedMethod(8, (2, 3, 1, 2)),
    ForcedMethod(4, (2, 1, 3, 1, 2), is_chain=True),
    ForcedMethod(26, (3, 2, 4, 2)),
    ForcedMethod(63, (4, 3, 2, 3)),
)
