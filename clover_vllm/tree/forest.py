"""Growing the trees of a whole batch together, as far as nodes and levels pay.

Candidates of all requests lie in one `Forest`. The head is asked level by level for the continuations of those that
may pay, and `choose_budget` says in the end which nodes are verified. Legend: R requests, K candidates per node, M
nodes expanded in a level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from clover_vllm.tree.budget import Budget, Floats, Ints, choose_budget, ranks
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

    def first(self) -> tuple[Floats, Ints]:
        """Log-probabilities, falling, and tokens behind the roots, each [R, K]."""
        ...

    def expand(self, parents: Ints, tokens: Ints) -> tuple[Floats, Ints]:
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
    of_nodes: Callable[[int], Floats]  # milliseconds of a step with 0, 1, ... nodes
    of_level: Callable[[int], float]  # milliseconds of a level that expands so many nodes
    spent: float = 0.0  # milliseconds of drafting so far


@dataclass
class Forest:
    """Candidates of all requests, flat and parents first; entry -1 is a request's root.

    Attributes:
        limits: int64 [R], most nodes per request.
        room: int64 [R], greatest depth of use per request.
        calibrations: by request, the calibration that speaks for it.
    """

    limits: Ints
    room: Ints
    calibrations: Sequence[Calibration]
    request: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    parent: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    token: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    depth: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    kind: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    odds: Floats = field(default_factory=lambda: np.zeros(0))
    chance: Floats = field(default_factory=lambda: np.zeros(0))  # if its parent is accepted
    gain: Floats = field(default_factory=lambda: np.zeros(0))  # of the whole path
    state: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # of the head; -1: not expanded
    _retrieved: dict[tuple[int, int, int], int] = field(
        default_factory=dict
    )  # request, parent, token -> entry
    _matches: dict[int, int] = field(default_factory=dict)  # by request

    def __len__(self) -> int:
        return len(self.token)

    def retrieve(self, found: Mapping[int, Retrieved]) -> None:
        """Add retrieved continuations, by request, before anything of the head."""
        rows: list[tuple[int, int, int, int, int]] = []  # request, parent, token, depth, kind
        shares: list[float] = []
        for request, own in found.items():
            first = len(rows)
            for token, parent, joint in zip(own.tokens, own.parents, own.probabilities, strict=True):
                if parent == ROOT:
                    above, depth, whole = ROOT, 1, 1.0
                else:
                    above, depth, whole = (
                        first + parent,
                        rows[first + parent][3] + 1,
                        own.probabilities[parent],
                    )
                self._retrieved[request, above, token] = len(rows)
                rows.append((request, above, token, depth, retrieved_kind(own.match, depth)))
                shares.append(min(max(joint / max(whole, 1e-6), 0.02), 0.98))
            self._matches[request] = own.match
        if not rows:
            return
        requests, parents, tokens, depths, kinds = np.array(rows, dtype=np.int64).T
        odds = log_odds(np.log(np.array(shares)))
        self._append(requests, parents, tokens, depths, kinds, odds, self._chances(requests, odds, kinds))
        self._multiply()

    def grow_head(
        self,
        drafter: LevelDrafter,
        requests: Ints,
        prices: Prices,
        following: Floats,
        levels: int,
        width: int = 4,
    ) -> None:
        """Ask the head for some requests, level by level, while a level promises more than it costs.

        Args:
            drafter: the head, whose roots are these requests.
            requests: int64 [R].
            prices: of nodes and levels; what is spent here is added.
            following: by depth, the usual chance of a node's best child.
            levels: most levels.
            width: most nodes that a level expands, per request on average.
        """
        log_probs, tokens = drafter.first()
        self._extend(np.full(len(requests), ROOT), requests, log_probs, tokens, 1)
        states, most = len(requests), width * len(requests)
        rooted = np.zeros(len(self.limits), dtype=bool)
        rooted[requests] = True
        for _ in range(levels - 1):
            budget = self.budget(prices)
            open_ = (self.state < 0) & (self.depth < self.room[self.request])
            known = np.where(self.parent == ROOT, rooted[self.request], self.state[self.parent] >= 0)
            surplus = self.gain * following[np.minimum(self.depth, len(following) - 1)] - budget.price
            chosen = np.flatnonzero(open_ & known & (surplus > 0.0))
            if len(chosen) > most:
                chosen = np.sort(chosen[np.argsort(-surplus[chosen], kind="stable")[:most]])
            cost = prices.of_level(len(chosen))
            if not len(chosen) or surplus[chosen].sum() <= budget.rate * cost:
                return
            prices.spent += cost
            above = self.parent[chosen]
            roots = np.searchsorted(requests, self.request[chosen])
            parents = np.where(above == ROOT, roots, self.state[above])
            log_probs, tokens = drafter.expand(parents, self.token[chosen])
            self.state[chosen] = states + np.arange(len(chosen))
            states += len(chosen)
            self._extend(chosen, self.request[chosen], log_probs, tokens, None)

    def _extend(
        self, above: Ints, requests: Ints, log_probs: Floats, tokens: Ints, depth: int | None
    ) -> None:
        """Add the head's children, [M, K], of entries [M] of some requests; NaNs add none."""
        k = len(tokens.T)
        depths = np.ones(len(above), dtype=np.int64) if depth else self.depth[above] + 1
        odds = log_odds(log_probs).ravel()
        kinds = np.repeat(np.minimum(depths, DEPTHS) - 1, k)
        flat, owners, parents = tokens.ravel(), np.repeat(requests, k), np.repeat(above, k)
        agreed = self._agreed(owners, parents, flat) if self._retrieved else None
        fresh = np.ones(len(flat), dtype=bool)
        if agreed:
            for i, entry in agreed:
                kinds[i] = _BOTH + _match(self._matches[int(owners[i])])
                fresh[i] = False
                self.kind[entry], self.odds[entry] = kinds[i], odds[i]
        chances = self._chances(owners, odds, kinds)
        if agreed:
            for i, entry in agreed:
                self.chance[entry] = max(chances[i], self.chance[entry])
            self._multiply()
        gains = chances * np.where(parents == ROOT, 1.0, self.gain[parents] if len(self) else 1.0)
        keep = np.flatnonzero(
            fresh & (gains >= FLOOR) & np.repeat(np.isfinite(log_probs).all(1), k)
            & (np.repeat(depths, k) <= self.room[owners])
        )  # fmt: skip
        self._append(
            owners[keep],
            parents[keep],
            flat[keep],
            np.repeat(depths, k)[keep],
            kinds[keep],
            odds[keep],
            chances[keep],
        )
        self.gain = np.concatenate((self.gain[: len(self) - len(keep)], gains[keep]))

    def _agreed(self, owners: Ints, parents: Ints, tokens: Ints) -> list[tuple[int, int]]:
        """Which of the head's children are retrieved already: their place, and the entry."""
        of = set(self._matches)
        places = [i for i, owner in enumerate(owners.tolist()) if owner in of]
        found = ((i, self._retrieved.get((int(owners[i]), int(parents[i]), int(tokens[i])))) for i in places)
        return [(i, entry) for i, entry in found if entry is not None]

    def _chances(self, owners: Ints, odds: Floats, kinds: Ints) -> Floats:
        speakers = {id(c): c for c in self.calibrations}
        if len(speakers) == 1:
            return self.calibrations[0](odds, kinds)
        chances = np.zeros(len(odds))
        for speaker in speakers.values():
            own = np.array([c is speaker for c in self.calibrations])[owners]
            chances[own] = speaker(odds[own], kinds[own])
        return chances

    def _append(
        self, request: Ints, parent: Ints, token: Ints, depth: Ints, kind: Ints, odds: Floats, chance: Floats
    ) -> None:
        self.request = np.concatenate((self.request, request.astype(np.int64)))
        self.parent = np.concatenate((self.parent, parent.astype(np.int64)))
        self.token = np.concatenate((self.token, token.astype(np.int64)))
        self.depth = np.concatenate((self.depth, depth.astype(np.int64)))
        self.kind = np.concatenate((self.kind, kind))
        self.odds = np.concatenate((self.odds, odds))
        self.chance = np.concatenate((self.chance, chance))
        self.state = np.concatenate((self.state, np.full(len(token), -1, dtype=np.int64)))

    def _multiply(self) -> None:
        """Gains anew from the chances along all paths."""
        self.gain = self.chance.copy()
        for depth in range(2, int(self.depth.max(initial=1)) + 1):
            own = np.flatnonzero(self.depth == depth)
            self.gain[own] = self.chance[own] * self.gain[self.parent[own]]

    def order(self) -> Ints:
        """Entries by falling gain, parents first, no more of a request than its limit."""
        usable = np.flatnonzero((self.depth <= self.room[self.request]) & (self.gain >= FLOOR))
        order = usable[np.argsort(-self.gain[usable], kind="stable")]
        owners = self.request[order]
        return order[ranks(owners) < self.limits[owners]]

    def budget(self, prices: Prices) -> Budget:
        """The best number of nodes, given what has been spent."""
        gains = self.gain[self.order()]
        return choose_budget(gains, prices.sampling, prices.of_nodes(len(gains)) + prices.spent)

    def saved_by_retrieval(self, budget: Budget) -> float:
        """Milliseconds that the chosen nodes save which only retrieval proposes."""
        order = self.order()[: budget.nodes]
        alone = order[(self.kind[order] >= _RETRIEVED) & (self.kind[order] < _BOTH)]
        return float(np.maximum(self.gain[alone] - budget.price, 0.0).sum()) / budget.rate

    def trees(self, count: int) -> list[Tree]:
        """The best `count` nodes as one tree per request."""
        order = self.order()[:count]
        tokens: list[list[int]] = [[] for _ in self.limits]
        parents: list[list[int]] = [[] for _ in self.limits]
        gains: list[list[float]] = [[] for _ in self.limits]
        signals: list[list[tuple[int, float]]] = [[] for _ in self.limits]
        position = {ROOT: ROOT}
        for entry, r, above, token, gain, kind, odds in zip(
            order.tolist(), self.request[order].tolist(), self.parent[order].tolist(), self.token[order].tolist(),
            self.gain[order].tolist(), self.kind[order].tolist(), self.odds[order].tolist(), strict=True,
        ):  # fmt: skip
            position[entry] = len(tokens[r])
            tokens[r].append(token)
            parents[r].append(position[above])
            gains[r].append(gain)
            signals[r].append((kind, odds))
        return [
            Tree(*parts) if parts[0] else Tree([], [])
            for parts in zip(tokens, parents, gains, signals, strict=True)
        ]
