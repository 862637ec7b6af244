"""Trees in tensors are the trees of lists."""

from __future__ import annotations

import random

import torch

from clover_vllm.tree import MAX_NODES, ROOT, Tree, TreeBatch
from clover_vllm.tree.batch import PADDING, ancestry, likeliest_chains


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


def test_ancestry_is_that_of_each_tree() -> None:
    for seed, nodes in enumerate((1, 2, 5, 16, 40, MAX_NODES)):
        trees, batch = random_batch(seed, nodes)
        bits, depths = ancestry(batch.parents)
        for r, tree in enumerate(trees):
            assert bits[r, : len(tree)].tolist() == tree.masks[1:]
            assert depths[r, : len(tree)].tolist() == tree.depths


def test_a_chain_of_all_nodes_is_causal_to_its_last_bit() -> None:
    bits, depths = ancestry(torch.arange(-1, MAX_NODES - 1)[None])
    assert bits[0].tolist() == Tree.chain([0] * MAX_NODES).masks[1:]
    assert bits[0, -1] == -1
    assert depths[0].tolist() == list(range(1, MAX_NODES + 1))


def test_likeliest_chains_are_those_of_each_tree() -> None:
    trees, batch = random_batch(3, 16)
    chains = likeliest_chains(batch.tokens, batch.parents, 16)
    for found, tree in zip(chains.tolist(), trees, strict=True):
        expected = list(tree.likeliest_chain().tokens)
        assert found == expected + [PADDING] * (16 - len(expected))


def test_padding_changes_no_tree() -> None:
    trees, batch = random_batch(4, 7)
    for tree, found in zip(trees, batch.padded(12).to_host(), strict=True):
        assert (list(found.tokens), list(found.parents)) == (list(tree.tokens), list(tree.parents))
