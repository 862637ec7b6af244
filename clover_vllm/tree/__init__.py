"""Draft trees as pure tensors: topology, growth, verification walk. Knows nothing of vLLM.

A draft tree hangs under a *root*, the last token that the target has emitted. Its *nodes* are
draft tokens; a node's parent always stands before it, so any prefix of a tree's node list is
itself a tree. Depth 1 is a child of the root.
"""

from clover_vllm.tree.growth import (
    Cutoffs,
    Drafter,
    grow_best_first,
    grow_static,
)
from clover_vllm.tree.masks import accepted_moves, ancestor_bits, ancestor_matrix
from clover_vllm.tree.topology import PUBLISHED_25, ROOT, DraftTrees, StaticTopology, chain
from clover_vllm.tree.walk import Accepted, walk

__all__ = [
    "PUBLISHED_25",
    "ROOT",
    "Accepted",
    "Cutoffs",
    "DraftTrees",
    "Drafter",
    "StaticTopology",
    "accepted_moves",
    "ancestor_bits",
    "ancestor_matrix",
    "chain",
    "grow_best_first",
    "grow_static",
    "walk",
]
