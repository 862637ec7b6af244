"""Growing the trees of a whole batch together, as far as nodes and levels pay.

Candidates of all requests lie in one `Forest`. The head is asked level by level for the continuations of those that
may pay, and `choose_budget` says in the end which nodes are verified. Legend: R requests, K candidates per node, M
nodes expanded in a level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from clover_vllm.tree.budget import Budget, Floats, choose_budget
from clover_vllm.tree.calibration import Calibration, log_odds
from clover_vllm.tree.draft import ROOT, Tree

DEPTHS = 8
"""Depths that have an intercept of their own; deeper nodes share the last."""

MATCHES = (1, 2, 4, 8, 16)
"""Lengths of a match from which on retrieved nodes have intercepts of their own."""

MATCH_DEPTHS = 4

_RETRIEVED = DEPTHS
_BOTH = _RETRIEVED + len(MATCHES) * MATCH_DEPTHS
KINDS = _BOTH + len(MATCHES)
"""Kinds of nodes: of the head by depth, retrieved by length of the match and depth, and of both by match."""

FLOOR = 0.01
"""Candidates below this chance are not looked at: no step is so cheap that they would pay."""


def head_kind(depth: int) -> int:
    """Of a node that the head proposes."""
    return min(depth, DEPTHS) - 1


def _match(length: int) -> int:
    return sum(length >= bound for bound in MATCHES[1:])


def retrieved_kind(length: int, depth: int) -> int:
    """Of a node that follows in an earlier text, where the last `length` tokens were the same."""
    return _RETRIEVED + _match(length) * MATCH_DEPTHS + min(depth, MATCH_DEPTHS) - 1


def source_of(kind: int) -> str:
    """`head`, `retrieved` or `both`."""
    return "head" if kind < _RETRIEVED else "retrieved" if kind < _BOTH else "both"


def first_intercepts() -> Floats:
    """Where calibration starts: a retrieved node is no certainty, one on which both agree is likelier."""
    start = np.zeros(KINDS)
    for m in range(len(MATCHES)):
        for depth in range(1, MATCH_DEPTHS + 1):
            start[retrieved_kind(MATCHES[m], depth)] = -3.0 + 0.5 * m
        start[_BOTH + m] = 0.5
    return start


class LevelDrafter(Protocol):
    """The head, level by level. States are numbered: 0 to R - 1 the roots', then those of `expand`, in order."""

    def first(self) -> tuple[list[list[float]], list[list[int]]]:
        """Log-probabilities, falling, and tokens behind the roots, each [R, K]."""
        ...

    def expand(
        self, parents: Sequence[int], tokens: Sequence[int]
    ) -> tuple[list[list[float]], list[list[int]]]:
        """The same, [M, K], behind nodes given by their parents' states and their tokens, each [M]."""
        ...


@dataclass(frozen=True)
class Retrieved:
    """A tree of continuations found in earlier text, parents first."""

    tokens: Sequence[int]
    parents: Sequence[int]
    probabilities: Sequence[float]  # joint, by how often each was the continuation
    match: int  # tokens before it that were the same


@dataclass
class Prices:
    """What decides whether a level is drafted and a node verified."""

    sampling: int  # requests of the next step that sample a token
    of_nodes: Callable[
        [int], Sequence[float]
    ]  # milliseconds of a step with 0, 1, ... nodes, to this number or more
    of_level: Callable[[int], float]  # milliseconds of a level that expands this number of nodes
    spent: float = 0.0  # milliseconds of drafting so far


@dataclass(slots=True)
class Candidate:
    """A node that may be verified."""

    request: int
    parent: Candidate | None  # None: the root
    token: int
    depth: int
    kind: int
    odds: float
    chance: float  # of acceptance if its parent is accepted
    gain: float  # of its whole path
    state: int = -1  # of the head, once it is expanded
    best_child: float = 0.0  # chance of the likeliest child that the head gave


class Forest:
    """Candidates of all requests, parents first."""

    def __init__(
        self, limits: Sequence[int], room: Sequence[int], calibrations: Sequence[Calibration]
    ) -> None:
        """
        Args:
            limits: [R], most nodes per request.
            room: [R], greatest depth of use per request.
            calibrations: [R], which of them speaks for a request.
        """
        self._limits, self._room, self._calibrations = limits, room, calibrations
        self.candidates: list[Candidate] = []
        self._retrieved: dict[tuple[int, int, int], Candidate] = {}  # request, parent's id, token
        self._children: dict[int, list[Candidate]] = {}  # retrieved ones by their parent's id
        self._matches: dict[int, int] = {}  # by request

    def retrieve(self, found: Mapping[int, Retrieved]) -> None:
        """Add retrieved continuations, by request, before anything of the head."""
        for request, own in found.items():
            made: list[Candidate] = []
            calibration = self._calibrations[request]
            for token, parent, joint in zip(own.tokens, own.parents, own.probabilities, strict=True):
                above = None if parent == ROOT else made[parent]
                depth, whole, gain = 1, 1.0, 1.0
                if above is not None:
                    depth, whole, gain = above.depth + 1, own.probabilities[parent], above.gain
                share = min(max(joint / max(whole, 1e-6), 0.02), 0.98)
                odds, kind = log_odds(math.log(share)), retrieved_kind(own.match, depth)
                chance = calibration(odds, kind)
                made.append(Candidate(request, above, token, depth, kind, odds, chance, gain * chance))
                self._retrieved[request, id(above), token] = made[-1]
                self._children.setdefault(id(above), []).append(made[-1])
            self._matches[request] = own.match
            self.candidates += made

    def grow_head(
        self,
        drafter: LevelDrafter,
        requests: Sequence[int],
        prices: Prices,
        following: Sequence[float],
        levels: int,
        width: int = 4,
    ) -> None:
        """Ask the head for some requests, level by level, while a level promises more than it costs.

        Args:
            drafter: the head, whose roots are these requests.
            requests: ascending.
            prices: of nodes and levels; what is spent here is added.
            following: by depth, the usual chance of a node's best child.
            levels: most levels.
            width: most nodes that a level expands, per request on average.
        """
        log_probs, tokens = drafter.first()
        for request, own, ids in zip(requests, log_probs, tokens, strict=True):
            self._extend(request, None, own, ids)
        states, roots = len(requests), {request: i for i, request in enumerate(requests)}
        last = len(following) - 1
        for _ in range(levels - 1):
            budget = self.budget(prices)
            chosen: list[tuple[float, Candidate]] = []
            for c in self.candidates:
                if c.state >= 0 or c.depth >= self._room[c.request]:
                    continue
                surplus = c.gain * following[min(c.depth, last)] - budget.price
                known = c.request in roots if c.parent is None else c.parent.state >= 0
                if surplus > 0.0 and known:
                    chosen.append((surplus, c))
            if len(chosen) > width * len(requests):
                chosen = sorted(chosen, key=lambda pair: -pair[0])[: width * len(requests)]
            cost = prices.of_level(len(chosen))
            if not chosen or sum(surplus for surplus, _ in chosen) <= budget.rate * cost:
                return
            prices.spent += cost
            level = [c for _, c in chosen]
            parents = [roots[c.request] if c.parent is None else c.parent.state for c in level]
            log_probs, tokens = drafter.expand(parents, [c.token for c in level])
            for state, (c, own, ids) in enumerate(zip(level, log_probs, tokens, strict=True), start=states):
                c.state = state
                self._extend(c.request, c, own, ids)
            states += len(level)

    def _extend(
        self, request: int, parent: Candidate | None, log_probs: Sequence[float], tokens: Sequence[int]
    ) -> None:
        """Add the head's children, [K], likeliest first. A NaN adds none."""
        depth, whole = (1, 1.0) if parent is None else (parent.depth + 1, parent.gain)
        if depth > self._room[request] or not math.isfinite(sum(log_probs)):
            return
        calibration, kind = self._calibrations[request], head_kind(depth)
        for log_prob, token in zip(log_probs, tokens, strict=True):
            odds = log_odds(log_prob)
            agreed = self._retrieved.get((request, id(parent), token)) if self._retrieved else None
            if agreed is not None:
                self._agree(agreed, odds)
                chance = agreed.chance
            else:
                chance = calibration(odds, kind)
                gain = whole * chance
                if gain < FLOOR:
                    continue
                self.candidates.append(Candidate(request, parent, token, depth, kind, odds, chance, gain))
            if parent is not None and chance > parent.best_child:
                parent.best_child = chance

    def _agree(self, candidate: Candidate, odds: float) -> None:
        """The head proposes a retrieved node too."""
        candidate.kind = _BOTH + _match(self._matches[candidate.request])
        candidate.odds = odds
        chance = self._calibrations[candidate.request](odds, candidate.kind)
        if chance > candidate.chance:
            candidate.chance = chance
            self._multiply(candidate)

    def _multiply(self, candidate: Candidate) -> None:
        """Gains anew from a node downwards, where so far there are retrieved nodes only."""
        candidate.gain = candidate.chance * (1.0 if candidate.parent is None else candidate.parent.gain)
        for child in self._children.get(id(candidate), ()):
            self._multiply(child)

    def best(self) -> list[Candidate]:
        """Candidates by falling gain, parents first, no more of a request than its limit."""
        usable = [c for c in self.candidates if c.gain >= FLOOR and c.depth <= self._room[c.request]]
        usable.sort(key=_falling)  # stable
        counts = [0] * len(self._limits)
        found = []
        for c in usable:
            if counts[c.request] < self._limits[c.request]:
                counts[c.request] += 1
                found.append(c)
        return found

    def budget(self, prices: Prices) -> Budget:
        """The best number of nodes, given what has been spent."""
        gains = [c.gain for c in self.best()]
        return choose_budget(gains, prices.sampling, prices.of_nodes(len(gains)), prices.spent)

    def saved_by_retrieval(self, budget: Budget) -> float:
        """Milliseconds that the chosen nodes save which only retrieval proposes."""
        own = (c.gain - budget.price for c in self.best()[: budget.nodes] if _RETRIEVED <= c.kind < _BOTH)
        return sum(max(0.0, surplus) for surplus in own) / budget.rate

    def trees(self, count: int) -> list[Tree]:
        """The best `count` nodes as one tree per request."""
        by_request: list[list[Candidate]] = [[] for _ in self._limits]
        position = {id(None): ROOT}
        for c in self.best()[:count]:
            position[id(c)] = len(by_request[c.request])
            by_request[c.request].append(c)
        return [
            Tree(
                [c.token for c in own],
                [position[id(c.parent)] for c in own],
                [c.gain for c in own],
                [(c.kind, c.odds) for c in own],
            )
            for own in by_request
        ]


def _falling(candidate: Candidate) -> float:
    return -candidate.gain
