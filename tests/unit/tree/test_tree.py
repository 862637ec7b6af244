"""Tree growth and the verification walk against brute force."""

from __future__ import annotations

import itertools
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import trees as random_trees

from clover_vllm.tree import (
    PUBLISHED_25,
    ROOT,
    Cutoffs,
    Shape,
    Tree,
    chain,
    grow_best_first,
    grow_fixed,
    walk,
)

Path = tuple[int, ...]


class TableDrafter:
    """Log-probabilities that depend on the whole path, from a hash; records nothing but paths."""

    def __init__(self, requests: int, vocab: int, seed: int) -> None:
        self.vocab = vocab
        self.seed = seed
        self.paths: list[list[Path]] = [[()] for _ in range(requests)]  # by request, by slot

    def log_probs(self, request: int, path: Path) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, request, path)) % 2**31)
        return torch.log_softmax(2 * torch.randn(self.vocab, generator=generator), -1)

    def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.stack([self.log_probs(r, ()) for r in range(len(self.paths))])
        best = rows.topk(num_candidates)
        return best.values, best.indices

    def expand(
        self, parent_slots: torch.Tensor, tokens: torch.Tensor, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        for r, (slots, ids) in enumerate(zip(parent_slots.tolist(), tokens.tolist(), strict=True)):
            known = list(self.paths[r])
            new = [(*known[slot], token) for slot, token in zip(slots, ids, strict=True)]
            self.paths[r].extend(new)
            rows.append(torch.stack([self.log_probs(r, p) for p in new]))
        best = torch.stack(rows).topk(num_candidates)
        return best.values, best.indices

    def joint(self, request: int, path: Path) -> float:
        return sum(float(self.log_probs(request, path[:i])[t]) for i, t in enumerate(path))


def paths_of(tree: Tree) -> list[Path]:
    """Token path of every node, in order; checks that parents come first and depths are right."""
    paths: list[Path] = []
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        assert parent < node
        paths.append((() if parent == ROOT else paths[parent]) + (token,))
        assert tree.depths[node] == len(paths[-1])
    return paths


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    requests=st.integers(1, 3),
    vocab=st.integers(2, 5),
    nodes=st.integers(1, 9),
    depth=st.integers(1, 4),
)
def test_best_first_growth_wide_enough_finds_the_best_tree(
    seed: int, requests: int, vocab: int, nodes: int, depth: int
) -> None:
    drafter = TableDrafter(requests, vocab, seed)
    # Expanding all candidates of a level makes the search exhaustive.
    trees = grow_best_first(drafter, nodes, depth, vocab**depth, num_candidates=vocab)
    for r in range(requests):
        every = [p for d in range(1, depth + 1) for p in itertools.product(range(vocab), repeat=d)]
        best = sorted((drafter.joint(r, p) for p in every), reverse=True)[:nodes]
        found = torch.tensor(trees[r].probabilities).log()
        torch.testing.assert_close(found, torch.tensor(best), atol=1e-4, rtol=0)
        for path, score in zip(paths_of(trees[r]), found.tolist(), strict=True):
            assert abs(drafter.joint(r, path) - score) < 1e-4


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 20),
    rounds=st.integers(1, 6),
    width=st.integers(1, 6),
    k=st.integers(1, 6),
)
def test_every_prefix_of_a_tree_is_a_tree_sorted_by_joint_probability(
    seed: int, nodes: int, rounds: int, width: int, k: int
) -> None:
    drafter = TableDrafter(3, 7, seed)
    trees = grow_best_first(drafter, nodes, rounds, width, num_candidates=k)
    for r in range(3):
        paths = paths_of(trees[r])
        scores = torch.tensor(trees[r].probabilities).log()
        assert len(set(paths)) == len(paths) <= nodes
        assert bool((scores[1:] <= scores[:-1]).all())
        for path, score in zip(paths, scores.tolist(), strict=True):
            assert abs(drafter.joint(r, path) - score) < 1e-4
        for size in (0, 1, nodes // 2):
            assert paths_of(trees[r].prefix(size)) == paths[:size]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    requests=st.integers(1, 3),
    nodes=st.integers(1, 20),
    rounds=st.integers(1, 6),
    width=st.integers(1, 6),
    k=st.integers(1, 6),
    min_share=st.sampled_from([0.0, 0.3, 0.9]),
    min_joint=st.sampled_from([0.0, 0.05, 0.2, 0.9]),
)
def test_growth_on_the_host_equals_growth_in_tensors(
    seed: int, requests: int, nodes: int, rounds: int, width: int, k: int, min_share: float, min_joint: float
) -> None:
    cutoffs = Cutoffs(min_share=min_share, min_joint=min_joint)
    found = []
    for limit in (0, 64):
        with patch("clover_vllm.tree.growth.HOST_REQUESTS", limit):
            drafter = TableDrafter(requests, 7, seed)
            found.append(grow_best_first(drafter, nodes, rounds, width, k, cutoffs))
    in_tensors, on_host = found
    for r, (one, two) in enumerate(zip(in_tensors, on_host, strict=True)):
        assert (one.tokens, one.parents) == (two.tokens, two.parents)
        assert one.probabilities == pytest.approx(two.probabilities, rel=1e-5)
        for path in paths_of(two):
            assert len(path) == 1 or math.exp(drafter.joint(r, path[:-1])) >= min_joint - 1e-4


class CertainDrafter(TableDrafter):
    """All probability on one token: every score of a path ties with its parent's."""

    def log_probs(self, request: int, path: Path) -> torch.Tensor:
        row = torch.full((self.vocab,), -torch.inf)
        row[len(path) % self.vocab] = 0.0
        return row


def test_ties_keep_parents_first_and_impossible_tokens_never_grow() -> None:
    for limit in (0, 64):
        with patch("clover_vllm.tree.growth.HOST_REQUESTS", limit):
            trees = grow_best_first(CertainDrafter(2, 5, 0), 8, 4, 2, num_candidates=3)
        for r in range(2):
            assert paths_of(trees[r]) == [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]


class NaNDrafter(TableDrafter):
    """Scores that are no numbers, all or one of them, from depth r on for request r; none for request 3."""

    def log_probs(self, request: int, path: Path) -> torch.Tensor:
        row = super().log_probs(request, path)
        if request < 3 and len(path) >= request:
            row[slice(None) if request == 1 else 2] = torch.nan
        return row


@pytest.mark.parametrize("limit", [0, 64])
def test_scores_that_are_no_numbers_leave_their_request_without_a_tree(limit: int) -> None:
    with patch("clover_vllm.tree.growth.HOST_REQUESTS", limit):
        trees = grow_best_first(NaNDrafter(4, 6, 1), 9, 4, 3, num_candidates=6)
        alone = grow_best_first(TableDrafter(4, 6, 1), 9, 4, 3, num_candidates=6)
    for r in (0, 1, 2):
        assert paths_of(trees[r]) == []
    assert len(paths_of(trees[3])) == 9
    assert paths_of(trees[3]) == paths_of(alone[3])


def test_cutoffs_drop_unlikely_children() -> None:
    log_probs = torch.tensor([0.5, 0.3, 0.12, 0.05, 0.03]).log()
    kept = Cutoffs(top_p=0.75).apply(log_probs).isfinite()
    assert kept.tolist() == [True, True, False, False, False]
    kept = Cutoffs(min_share=0.25).apply(log_probs).isfinite()
    assert kept.tolist() == [True, True, False, False, False]
    kept = Cutoffs(min_share=0.2).apply(log_probs).isfinite()
    assert kept.tolist() == [True, True, True, False, False]
    assert torch.equal(Cutoffs().apply(log_probs), log_probs)
    assert Cutoffs(top_p=0.0).apply(log_probs).isfinite().tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("shape", [chain(1), chain(5), PUBLISHED_25, Shape([(1,), (1, 2)][:1])])
def test_static_growth_takes_the_ranks_it_names(shape: Shape) -> None:
    drafter = TableDrafter(2, 6, 3)
    trees = grow_fixed(drafter, shape)
    for r in range(2):
        expected = []
        for ranks in shape.paths:
            path: Path = ()
            for rank in ranks:
                order = drafter.log_probs(r, path).argsort(descending=True).tolist()
                path = (*path, order[rank])
            expected.append(path)
        assert paths_of(trees[r]) == expected
        for probability, path in zip(trees[r].probabilities, expected, strict=True):
            assert abs(math.log(probability) - drafter.joint(r, path)) < 1e-4


def test_published_tree_has_25_nodes_in_five_levels() -> None:
    assert len(PUBLISHED_25) == 25
    assert [len(PUBLISHED_25.nodes_at(d)) for d in range(1, 6)] == [4, 8, 8, 3, 2]


@pytest.mark.parametrize("paths", [[(0, 0)], [(0,), (0,)], [()], [(-1,)]])
def test_impossible_topologies_are_refused(paths: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"\.$"):
        Shape(paths)


@pytest.mark.parametrize("shape", [chain(3), PUBLISHED_25])
def test_fixed_shapes_leave_a_request_with_a_nan_without_a_tree(shape: Shape) -> None:
    trees = grow_fixed(NaNDrafter(4, 6, 1), shape)
    alone = grow_fixed(TableDrafter(4, 6, 1), shape)
    assert len(trees[1]) == 0
    assert paths_of(trees[3]) == paths_of(alone[3])


@settings(max_examples=200, deadline=None)
@given(tree=random_trees(), data=st.data())
def test_walk_equals_brute_force(tree: Tree, data: st.DataObject) -> None:
    rows = len(tree) + 1
    emitted = data.draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    current, path = ROOT, []
    while True:
        children = [
            n
            for n in range(len(tree))
            if (tree.parents[n], tree.tokens[n]) == (current, emitted[current + 1])
        ]
        if not children:
            break
        (current,) = children
        path.append(current)
    assert walk(tree, emitted) == path


def test_of_equal_siblings_the_first_is_walked_to() -> None:
    tree = Tree([3, 3, 7], [ROOT, ROOT, 1])
    assert tree.children == {(ROOT, 3): 0, (1, 7): 2}
    assert walk(tree, [3, 7, 7, 7]) == [0]
