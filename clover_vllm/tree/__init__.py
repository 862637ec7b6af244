"""Tree verification without vLLM: draft trees, their growth, the step that verifies them, the walk.

A draft tree hangs under a *root*, the last token that the target has emitted. Its *nodes* are
draft tokens; a node's parent always stands before it, so any prefix of a tree's node list is
itself a tree. Depth 1 is a child of the root. Read in this order: `draft`, `shapes`, `growth`, `step`, `walk`.
"""

from clover_vllm.tree.batch import TreeBatch
from clover_vllm.tree.draft import MAX_NODES, ROOT, Tree
from clover_vllm.tree.growth import Cutoffs, Drafter, grow_best_first, grow_fixed
from clover_vllm.tree.shapes import PUBLISHED_25, Shape, chain
from clover_vllm.tree.walk import walk

__all__ = [
    "MAX_NODES",
    "PUBLISHED_25",
    "ROOT",
    "Cutoffs",
    "Drafter",
    "Shape",
    "Tree",
    "TreeBatch",
    "chain",
    "grow_best_first",
    "grow_fixed",
    "walk",
]
