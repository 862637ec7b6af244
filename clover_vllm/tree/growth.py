"""Growing draft trees from a drafter, for many requests at once.

A drafter scores continuations; this file decides which to keep. Legend: R requests, K candidates per node, W nodes
expanded per round, P candidates in a request's pool.
"""

from __future__ import annotations

import heapq
import math
import sys
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from clover_vllm.base.tensors import tensor_of
from clover_vllm.tree.batch import PADDING, TreeBatch
from clover_vllm.tree.draft import ROOT, Tree
from clover_vllm.tree.shapes import Shape

HOST_REQUESTS = 64
"""On a CPU, up to this many requests grow in plain Python, which is faster there."""


class Drafter(Protocol):
    """Scores continuations, remembering a recurrent state per expanded node.

    States have slots: 0 is the root's; the nodes of successive `expand` calls get 1, 2, 3, ... in
    the order in which they were passed, the same numbers in every request.
    """

    def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Best continuations of the root.

        Returns:
            float32 [R, K] log-probabilities, falling, and int64 [R, K] token ids.
        """
        ...

    def expand(
        self, parent_slots: torch.Tensor, tokens: torch.Tensor, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Best continuations of nodes.

        Args:
            parent_slots: int64 [R, W], slot of each node's parent.
            tokens: int64 [R, W], the token at each node.
            num_candidates: K.

        Returns:
            float32 [R, W, K] log-probabilities, falling, and int64 [R, W, K] token ids.
        """
        ...


@dataclass(frozen=True)
class Cutoffs:
    """Where growing stops early.

    Clover's candidate cut-offs (arXiv 2405.00263): a child stays while the siblings before it hold less than
    `top_p` of their parent's probability, and while its own is at least `min_share` of its best sibling's.
    Ours, for best-first growth: a node is expanded if its joint probability is at least `min_joint`.
    """

    top_p: float = 1.0
    min_share: float = 0.0
    min_joint: float = 0.0

    @property
    def min_score(self) -> float:
        """The logarithm of `min_joint`."""
        return math.log(self.min_joint) if self.min_joint > 0.0 else -math.inf

    def apply(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Set dropped children of [..., K] falling log-probabilities to -inf."""
        if self.top_p >= 1.0 and self.min_share <= 0.0:
            return log_probs
        probs = log_probs.exp()
        before = probs.cumsum(-1) - probs
        dropped = (before >= self.top_p) | (probs < self.min_share * probs[..., :1])
        dropped[..., 0] = False
        return log_probs.masked_fill(dropped, -torch.inf)


def grow_best_first(
    drafter: Drafter,
    num_nodes: int,
    rounds: int,
    width: int,
    num_candidates: int | None = None,
    cutoffs: Cutoffs | None = None,
    fixed_levels: bool = False,
) -> list[Tree]:
    """Grow by joint probability.

    The root is expanded, then `rounds - 1` times the `width` best unexpanded candidates of all
    levels so far; the best `num_nodes` candidates are the tree. A child is never likelier than its
    parent, so they form a tree, in parent-first order.

    A request for which the drafter gives a NaN gets no tree.

    Args:
        drafter: scores continuations.
        num_nodes: most nodes per request.
        rounds: drafting levels, so also the greatest depth.
        width: nodes expanded per round.
        num_candidates: children considered per node; by default `num_nodes`, at most 8.
        cutoffs: drop unlikely children early.
        fixed_levels: ask the drafter for every level in full width, whatever it says, so that ranks whose
            arithmetic differs in a bit make the same calls.

    Returns:
        by request, a tree of at most `num_nodes` nodes, sorted by falling joint probability.
    """
    k = min(num_nodes, 8) if num_candidates is None else num_candidates
    cutoffs = cutoffs or Cutoffs()
    log_probs, tokens = drafter.first(k)
    on_host = tokens.device.type == "cpu" and len(tokens) <= HOST_REQUESTS and not fixed_levels
    if on_host:
        return _grow_on_host(drafter, log_probs, tokens, num_nodes, rounds, width, cutoffs)
    return _grow_on_device(drafter, log_probs, tokens, num_nodes, rounds, width, cutoffs).to_host()


def grow_best_first_on_device(
    drafter: Drafter, num_nodes: int, rounds: int, width: int, num_candidates: int, cutoffs: Cutoffs
) -> TreeBatch:
    """As `grow_best_first`, in full width at every level and without waiting for the device."""
    log_probs, tokens = drafter.first(num_candidates)
    return _grow_on_device(drafter, log_probs, tokens, num_nodes, rounds, width, cutoffs)


def _grow_on_host(
    drafter: Drafter,
    log_probs: torch.Tensor,
    tokens: torch.Tensor,
    num_nodes: int,
    rounds: int,
    width: int,
    cutoffs: Cutoffs,
) -> list[Tree]:
    """Best-first growth in plain Python: a few hundred numbers, where tensor operations cost more than they do."""
    k = tokens.shape[1]
    pools = [
        _Pool(scores, own, k)
        for scores, own in zip(cutoffs.apply(log_probs).tolist(), tokens.tolist(), strict=True)
    ]
    for _ in range(rounds - 1):
        level_width = min(width, max(pool.growing(cutoffs.min_score) for pool in pools))
        if not level_width:
            break
        chosen = [pool.take(level_width) for pool in pools]  # as many in each
        slots = tensor_of([[c // k for c in own] for own in chosen])
        level = tensor_of([[pool.tokens[c] for c in own] for pool, own in zip(pools, chosen, strict=True)])
        child_log_probs, child_tokens = drafter.expand(slots, level, k)
        children = zip(cutoffs.apply(child_log_probs).tolist(), child_tokens.tolist(), strict=True)
        for pool, own, (scores, ids) in zip(pools, chosen, children, strict=True):
            for c, child_scores, child_ids in zip(own, scores, ids, strict=True):
                pool.add(c, child_scores, child_ids, cutoffs.min_score)
    return [pool.best(num_nodes) for pool in pools]


class _Pool:
    """Candidates of one request. Those of the node with slot s are entries s * k to s * k + k - 1."""

    def __init__(self, scores: list[float], tokens: list[int], k: int) -> None:
        self.tokens = tokens
        self._k = k
        self._scores = scores
        self._broken = any(math.isnan(p) for p in scores)
        self._open = self._scores.copy()  # -inf: expanded
        self._entries = [ROOT]  # of the slots' nodes

    def take(self, width: int) -> list[int]:
        """The best entries to expand next; expanded ones only where no others are left."""
        return heapq.nlargest(width, range(len(self._open)), key=self._open.__getitem__)

    def growing(self, min_score: float) -> int:
        """Unexpanded entries that are likely enough to expand."""
        least = max(min_score, -sys.float_info.max)
        return 0 if self._broken else sum(score >= least for score in self._open)

    def add(self, entry: int, log_probs: list[float], tokens: list[int], min_score: float) -> None:
        """Children of an entry; of one that is not likely enough, none that counts."""
        score = self._open[entry]
        self._open[entry] = -math.inf
        if score < min_score:
            score = -math.inf
        self._entries.append(entry)
        self._broken |= any(math.isnan(p) for p in log_probs)
        scores = [score + p for p in log_probs]
        self._scores += scores
        self._open += scores
        self.tokens += tokens

    def best(self, num_nodes: int) -> Tree:
        """The tree of the best entries.

        The sort is stable and a parent stands before its children, also where a child is certain and both
        scores are equal.
        """
        if self._broken:
            return Tree([], [])
        scores, k = self._scores, self._k
        order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:num_nodes]
        order = [c for c in order if scores[c] > -math.inf]
        position = {c: i for i, c in enumerate(order)}
        position[ROOT] = ROOT
        return Tree(
            [self.tokens[c] for c in order],
            [position[self._entries[c // k]] for c in order],
            [math.exp(scores[c]) for c in order],
        )


def _grow_on_device(
    drafter: Drafter,
    log_probs: torch.Tensor,
    tokens: torch.Tensor,
    num_nodes: int,
    rounds: int,
    width: int,
    cutoffs: Cutoffs,
) -> TreeBatch:
    """Best-first growth in tensors of fixed shapes, which never wait for the device."""
    requests, k = tokens.shape
    # The pool holds the k children of every expanded node, slot by slot: pool entry c is a child of
    # the node with slot c // k, whose own pool entry is expanded[:, c // k - 1].
    pool = cutoffs.apply(log_probs)  # [R, P]; -inf: not a candidate, or expanded already
    broken = log_probs.isnan().any(1)
    expanded = tokens.new_empty(requests, 0)
    scores = pool.new_empty(requests, 0)  # of the expanded
    for _ in range(rounds - 1):
        best, chosen = pool.topk(min(width, pool.shape[1]), dim=1)  # [R, W]
        pool.scatter_(1, chosen, -torch.inf)
        parent_slots = chosen // k
        child_log_probs, child_tokens = drafter.expand(parent_slots, tokens.gather(1, chosen), k)
        from_scores = best.masked_fill(best < cutoffs.min_score, -torch.inf)
        child_scores = from_scores[..., None] + cutoffs.apply(child_log_probs)
        broken = broken | child_log_probs.isnan().flatten(1).any(1)
        pool = torch.cat([pool, child_scores.flatten(1)], dim=1)
        tokens = torch.cat([tokens, child_tokens.flatten(1)], dim=1)
        expanded = torch.cat([expanded, chosen], dim=1)
        scores = torch.cat([scores, best], dim=1)
    # Where fewer are left than fit, an entry is expanded again, with -inf: its first score counts.
    scores = pool.scatter_reduce(1, expanded, scores, "amax").masked_fill(broken[:, None], -torch.inf)
    return _select(scores, tokens, expanded, num_nodes)


def _select(
    scores: torch.Tensor,
    tokens: torch.Tensor,
    expanded: torch.Tensor,
    num_nodes: int,
) -> TreeBatch:
    """The best of the pool as trees.

    The sort is stable and a parent stands before its children in the pool, so the parent comes
    first even where a child is certain and both scores are equal.

    Args:
        scores: [R, P] joint log-probabilities of the pool.
        tokens: [R, P].
        expanded: [R, S], pool entries of the nodes with slots 1, 2, ...; the pool holds P / (S + 1) children
            of each slot.
        num_nodes: most nodes per tree.
    """
    n, k = min(num_nodes, scores.shape[1]), scores.shape[1] // (expanded.shape[1] + 1)
    ordered, index = torch.sort(scores, dim=1, descending=True, stable=True)
    ordered, index = ordered[:, :n], index[:, :n]
    position = torch.full_like(tokens, ROOT)
    position.scatter_(1, index, torch.arange(n, device=tokens.device).expand_as(index))
    # Where each slot's node stands in the selection; the root is slot 0.
    of_slot = torch.cat([torch.full_like(index[:, :1], ROOT), position.gather(1, expanded)], dim=1)
    parent_slots = index // k
    keep = ordered > -torch.inf
    return TreeBatch(
        tokens.gather(1, index).where(keep, PADDING),
        of_slot.gather(1, parent_slots).where(keep, ROOT),
        ordered,
    )


def grow_fixed(drafter: Drafter, shape: Shape) -> list[Tree]:
    """Fill a tree of fixed shape; a chain is one (`shapes.chain`).

    A request for which the drafter gives a NaN gets no tree.

    Returns:
        one tree of len(shape) nodes per request, nodes in the shape's order.
    """
    return grow_fixed_on_device(drafter, shape).to_host()


def grow_fixed_on_device(drafter: Drafter, shape: Shape) -> TreeBatch:
    """As `grow_fixed`, without waiting for the device."""
    k = shape.max_rank + 1
    log_probs, tokens = drafter.first(k)
    device = tokens.device
    node_tokens: list[torch.Tensor] = []
    node_scores: list[torch.Tensor] = []
    slot_of: dict[int, int] = {ROOT: 0}
    children_of: dict[int, tuple[torch.Tensor, torch.Tensor]] = {ROOT: (log_probs, tokens)}
    for depth in range(1, shape.max_depth + 1):
        level = shape.nodes_at(depth)
        for i in level:
            scores, candidates = children_of[shape.parents[i]]
            node_tokens.append(candidates[:, shape.ranks[i]])
            node_scores.append(scores[:, shape.ranks[i]])
        inner = [i for i in level if i in shape.parents]
        if not inner:
            continue
        parent_slots = _constant(tuple(slot_of[shape.parents[i]] for i in inner), device)
        level_tokens = torch.stack([node_tokens[i] for i in inner], dim=1)
        child_scores, child_tokens = drafter.expand(parent_slots.expand_as(level_tokens), level_tokens, k)
        for column, i in enumerate(inner):
            slot_of[i] = len(slot_of)
            children_of[i] = (
                node_scores[i][:, None] + child_scores[:, column],
                child_tokens[:, column],
            )
    scores = torch.stack(node_scores, dim=1)
    broken = scores.isnan().any(1, keepdim=True)
    parents = _constant(tuple(shape.parents), device).expand(scores.shape)
    return TreeBatch(
        torch.stack(node_tokens, dim=1).masked_fill(broken, PADDING),
        parents.masked_fill(broken, ROOT),
        scores.masked_fill(broken, -torch.inf),
    )


@cache
def _constant(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Brought to the device once, since a copy from the host may wait for it."""
    return torch.tensor(values, device=device)
