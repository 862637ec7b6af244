"""Trees in tensors are the trees of lists."""

from __future__ import annotations

import random

import torch

from clover_vllm.tree import MAX_NODES, ROOT, Tree, TreeBatch
from clover_vllm.tree.batch import PADDING


def random_batch(seed: int, nodes: int) -> tuple[list[Tree], TreeBatch]:
    """Trees of up to `nodes` nodes, one of them empty and one full."""
    rng = random.Random(seed)
    trees = []
    for count in (0, nodes, *(rng.randrange(nodes + 1) for _ in range(6))):
        above = [rng.randrange(-1, node) for node in range(count)]
        trees.append(Tree([rng.randrange(9) for _ in above], above))
    tokens = torch.full((len(trees), nodes), PADDING)
    parents = torch.full((len(trees), nodes), ROOT)
    for r, tree in enumerate(trees):
        tokens[r, : len(tree)] = torch.tensor(tree.tokens)
        parents[r, : len(tree)] = torch.tensor(tree.parents)
    return trees, TreeBatch(tokens, parents, torch.zeros(tokens.shape))


def test_what_comes_to_the_host_is_each_tree_without_padding() -> None:
    for seed, nodes in enumerate((1, 5, MAX_NODES)):
        trees, batch = random_batch(seed, nodes)
        for tree, found in zip(trees, batch.to_host(), strict=True):
            assert (list(found.tokens), list(found.parents)) == (list(tree.tokens), list(tree.parents))
