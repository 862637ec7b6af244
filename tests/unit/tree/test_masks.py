"""Ancestor masks and accepted rows against brute force, and against xformers as an independent oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import batches_of_trees
from xformers.ops.tree_attention import TreeAttnMetadata

from clover_vllm.tree import PUBLISHED_25, ROOT, Accepted, DraftTrees, StaticTopology, chain, walk
from clover_vllm.tree.masks import (
    accepted_moves,
    ancestor_bits,
    ancestor_matrix,
    row_depths,
    row_offsets,
)
from clover_vllm.tree.step import RequestTree, StepTrees
from clover_vllm.tree.walk import walk_tree


def static_trees(topology: StaticTopology, requests: int) -> DraftTrees:
    nodes = len(topology)
    return DraftTrees(
        torch.tensor(topology.ranks).repeat(requests),
        torch.tensor(topology.parents).repeat(requests),
        torch.tensor(topology.depths).repeat(requests),
        torch.zeros(nodes * requests),
        torch.arange(0, nodes * requests + 1, nodes),
    )


@settings(max_examples=100, deadline=None)
@given(trees=batches_of_trees())
def test_masks_are_the_ancestors(trees: DraftTrees) -> None:
    bits, depths, first = ancestor_bits(trees), row_depths(trees), row_offsets(trees).tolist()
    assert len(bits) == len(depths) == first[-1]
    for r in range(trees.num_requests):
        matrix = ancestor_matrix(bits[first[r] : first[r + 1]])
        for row in range(first[r + 1] - first[r]):
            expected, node = {0, row}, row - 1
            while node != ROOT:
                expected.add(node + 1)
                node = int(trees.parents[int(trees.offsets[r]) + node])
            assert set(matrix[row].nonzero()[:, 0].tolist()) == expected
            assert int(depths[first[r] + row]) == len(expected) - 1


# xformers wants choices sorted by length and draws a tree's root itself, as ours.
@pytest.mark.parametrize(
    "topology",
    [chain(5), PUBLISHED_25, StaticTopology([(0,), (1,), (2,), (1, 0), (1, 1), (2, 0), (1, 1, 0)])],
)
def test_masks_equal_those_of_xformers(topology: StaticTopology) -> None:
    oracle = TreeAttnMetadata.from_tree_choices(topology.paths, dtype=torch.float32, device="cpu")
    trees = static_trees(topology, 3)
    bits, nodes = ancestor_bits(trees), len(topology) + 1
    for r in range(3):
        matrix = ancestor_matrix(bits[r * nodes : (r + 1) * nodes])
        assert torch.equal(matrix, oracle.attention_bias == 0)
    assert torch.equal(row_depths(trees)[:nodes], oracle.tree_seq_position_ids)
    assert torch.equal(torch.tensor(topology.parents) + 1, oracle.parent_node_indices)


def test_sixty_three_nodes_fit_and_sixty_four_do_not() -> None:
    bits = ancestor_bits(static_trees(chain(63), 2))
    assert torch.equal(ancestor_matrix(bits[:64]), torch.ones(64, 64, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="64 nodes"):
        ancestor_bits(static_trees(chain(64), 1))


@settings(max_examples=100, deadline=None)
@given(trees=batches_of_trees(), data=st.data())
def test_the_engines_records_say_what_the_tensors_say(trees: DraftTrees, data: st.DataObject) -> None:
    """Masks, walk and moves on the host, beside prompt chunks, against those of `clover_vllm.tree`."""
    rows = len(trees.tokens) + trees.num_requests
    emitted = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows)))
    chunks = data.draw(st.lists(st.integers(0, 3), min_size=trees.num_requests, max_size=trees.num_requests))
    accepted, first = walk(trees, emitted), row_offsets(trees).tolist()
    bits, moves = ancestor_bits(trees), accepted_moves(accepted)
    made = RequestTree.from_batch(trees)
    sizes = [chunk + 1 + len(tree.tokens) for chunk, tree in zip(chunks, made, strict=True)]
    step = StepTrees([*made], sizes, [sum(sizes[:r]) for r in range(len(sizes))])
    for r, tree in enumerate(made):
        assert tree.masks == bits[first[r] + 1 : first[r + 1]].tolist()
        assert step.root_row(r) == step.first_rows[r] + chunks[r]
        step.accepted.append(walk_tree(tree.tokens, tree.parents, emitted[first[r] : first[r + 1]].tolist()))
        assert step.accepted[r] == accepted.nodes[r, : int(accepted.lengths[r])].tolist()
    roots = torch.tensor([step.root_row(r) for r in range(len(made))])
    assert step.moves() == (
        (roots[moves.request] + moves.source).tolist(),
        (roots[moves.request] + moves.destination).tolist(),
    )


@settings(max_examples=100, deadline=None)
@given(trees=batches_of_trees(), data=st.data())
def test_moves_leave_the_accepted_path_behind_the_root(trees: DraftTrees, data: st.DataObject) -> None:
    rows = len(trees.tokens) + trees.num_requests
    emitted = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    accepted: Accepted = walk(trees, torch.tensor(emitted))
    moves = accepted_moves(accepted)
    assert bool((moves.source > moves.destination).all())
    first = row_offsets(trees)[:-1]
    slots = torch.arange(rows)  # each row's slot holds its own number
    slots[first[moves.request] + moves.destination] = slots[first[moves.request] + moves.source]
    for r in range(trees.num_requests):
        length = int(accepted.lengths[r])
        base = int(first[r])
        path = [base, *(base + 1 + n for n in accepted.nodes[r, :length].tolist())]
        assert slots[base : base + length + 1].tolist() == path
