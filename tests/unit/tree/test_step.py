"""Masks, rows and moves against brute force, and masks against xformers as an independent oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import trees
from xformers.ops.tree_attention import TreeAttnMetadata

from clover_vllm.tree import MAX_NODES, PUBLISHED_25, ROOT, Shape, Tree, chain, walk
from clover_vllm.tree.draft import causal_masks
from clover_vllm.tree.step import CurrentStep, Ending, Step


def rows_seen(mask: int) -> set[int]:
    return {j for j in range(64) if mask >> j & 1}


def of_shape(shape: Shape) -> Tree:
    return Tree(shape.ranks, shape.parents)


@settings(max_examples=100, deadline=None)
@given(tree=trees())
def test_a_row_sees_its_ancestors_the_root_and_itself(tree: Tree) -> None:
    assert len(tree.masks) == len(tree) + 1
    for row, mask in enumerate(tree.masks):
        expected, node = {0, row}, row - 1
        while node != ROOT:
            expected.add(node + 1)
            node = tree.parents[node]
        assert rows_seen(mask) == expected
        if row:
            assert tree.depths[row - 1] == len(expected) - 1


@pytest.mark.parametrize(
    "shape", [chain(5), PUBLISHED_25, Shape([(0,), (1,), (2,), (1, 0), (1, 1), (2, 0), (1, 1, 0)])]
)
def test_masks_equal_those_of_xformers(shape: Shape) -> None:
    oracle = TreeAttnMetadata.from_tree_choices(shape.paths, dtype=torch.float32, device="cpu")
    tree = of_shape(shape)
    bits = (torch.tensor(tree.masks)[:, None] >> torch.arange(len(tree) + 1)) & 1
    assert torch.equal(bits.bool(), oracle.attention_bias == 0)
    assert torch.equal(torch.tensor([0, *tree.depths]), oracle.tree_seq_position_ids)
    assert torch.equal(torch.tensor(tree.parents) + 1, oracle.parent_node_indices)


def test_sixty_three_nodes_fit_and_sixty_four_do_not() -> None:
    tree = Tree.chain([0] * MAX_NODES)
    assert tree.is_chain
    assert tree.masks == causal_masks(64)
    assert tree.masks[63] == -1
    with pytest.raises(ValueError, match="64 nodes"):
        _ = Tree.chain([0] * 64).masks


@settings(max_examples=100, deadline=None)
@given(tree=trees(), count=st.integers(0, 12))
def test_a_prefix_of_a_tree_is_a_tree_with_the_same_masks(tree: Tree, count: int) -> None:
    cut = tree.prefix(count)
    assert list(cut.tokens) == list(tree.tokens[:count])
    assert cut.masks == tree.masks[: count + 1]
    assert cut.is_chain == all(parent == node - 1 for node, parent in enumerate(cut.parents))


@settings(max_examples=200, deadline=None)
@given(made=st.lists(st.one_of(st.none(), trees()), min_size=1, max_size=5), data=st.data())
def test_moves_leave_the_accepted_path_behind_the_root(made: list[Tree | None], data: st.DataObject) -> None:
    """Beside prompt chunks and requests without drafts."""
    sizes = [1 + (len(tree) if tree else 0) for tree in made]
    chunks = [data.draw(st.integers(0, 3)) for _ in made]
    rows = [chunk + size for chunk, size in zip(chunks, sizes, strict=True)]
    step = Step(made, rows)
    accepted = [
        walk(tree, data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))) if tree else []
        for tree, size in zip(made, sizes, strict=True)
    ]
    step.accepted = accepted
    sources, destinations = step.moves()
    assert all(a > b for a, b in zip(sources, destinations, strict=True))
    slots = list(range(sum(rows)))  # each row's slot holds its own number
    for source, destination in zip(sources, destinations, strict=True):  # in order
        slots[destination] = slots[source]
    for r, nodes in enumerate(accepted):
        base = sum(rows[:r]) + chunks[r]
        assert step.first_rows[r] == sum(rows[:r])
        assert step.root_rows[r] == base
        assert step.sampled_rows[r] == sum(sizes[:r])
        assert slots[base : base + len(nodes) + 1] == [base, *(base + 1 + node for node in nodes)]
    assert step.decodes_only == (sum(chunks) == 0)
    assert step.has_branches == any(tree is not None and not tree.is_chain for tree in made)


def test_what_was_accepted_cannot_be_read_before_it_is_known() -> None:
    step = Step.of_trees([Tree.chain([1, 2])])
    with pytest.raises(AssertionError, match="not been scored"):
        step.moves()


def test_a_step_that_has_ended_cannot_be_read() -> None:
    current = CurrentStep()
    step = Step.of_trees([None])
    current.begin(step)
    assert current.value is step
    current.end()
    assert not current.running
    with pytest.raises(AssertionError, match="no step"):
        _ = current.value


@pytest.mark.parametrize(
    ("ending", "emitted", "room"),
    [
        (Ending(), [5], True),
        (Ending(remaining=3), [5], True),
        (Ending(remaining=2), [5], False),  # one token to go: nothing of a draft could be accepted
        (Ending(remaining=3), [5, 6], False),
        (Ending(tokens=frozenset({5})), [5], False),
        (Ending(tokens=frozenset({5})), [6], True),
        (Ending(repeats=lambda emitted: len(emitted) > 1), [5, 5], False),
    ],
)
def test_drafts_have_room_only_before_the_last_token(ending: Ending, emitted: list[int], room: bool) -> None:
    assert ending.leaves_room(emitted) == room
