"""Growing the trees of a whole batch together, as far as nodes and levels pay.

Candidates of all requests lie in one `Forest`. The head is asked level by level for the continuations of those that
may pay, and `choose_budget` says in the end which nodes are verified. Nothing loops over requests or nodes in Python
but what makes the trees. Legend: R requests, K candidates per node, M nodes expanded in a level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Protocol

import numpy as np

from clover_vllm.tree import kinds
from clover_vllm.tree.budget import Bools, Budget, Floats, Ints, choose_budget
from clover_vllm.tree.calibration import Calibration, chances, log_odds
from clover_vllm.tree.draft import ROOT, Tree
from clover_vllm.tree.outcomes import Outcomes

FLOOR = 0.01
"""Candidates below this chance are not looked at: no step is so cheap that they would pay."""

NODE = np.dtype(
    [
        ("request", np.int64),
        ("parent", np.int64),  # place among the candidates, or ROOT
        ("token", np.int64),
        ("depth", np.int64),
        ("kind", np.int64),
        ("odds", np.float64),
        ("chance", np.float64),  # of acceptance if its parent is accepted
        ("gain", np.float64),  # of its whole path
        ("state", np.int64),  # of the head, once it is expanded; before that -1
        ("best_child", np.float64),  # chance of the likeliest child that the head gave
    ]
)
"""A node that may be verified."""


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
    of_nodes: Callable[[int], Floats]  # milliseconds of a step with 0, 1, ... nodes, to this number or more
    of_level: Callable[[int], float]  # milliseconds of a level that expands this number of nodes
    spent: float = 0.0  # milliseconds of drafting so far


class Forest:
    """Candidates of all requests, parents first.

    Attributes:
        nodes: [N], of dtype `NODE`. Those that were retrieved come before the head's.
        spoiled: requests for which the head gave NaN or infinity.
    """

    def __init__(
        self, limits: Sequence[int], room: Sequence[int], calibrations: Sequence[Calibration]
    ) -> None:
        """
        Args:
            limits: [R], most nodes per request.
            room: [R], greatest depth of use per request.
            calibrations: [R], which of them speaks for a request.
        """
        self.nodes = np.empty(0, NODE)
        self.spoiled: set[int] = set()
        self._limits, self._room = np.array(limits, np.int64), np.array(room, np.int64)
        known = {id(c): c for c in calibrations}
        order = {key: i for i, key in enumerate(known)}
        self._speaks = np.array([order[id(c)] for c in calibrations], np.int64)
        self._slopes = np.array([c.slope for c in known.values()])
        self._intercepts = np.array([c.intercepts for c in known.values()])
        self._matches = np.zeros(len(limits), np.int64)
        self._best: Ints | None = None  # until nodes change
        self._found = 0  # retrieved nodes
        self._keys: Ints = np.empty(0, np.int64)  # of retrieved nodes, ascending
        self._places: Ints = np.empty(0, np.int64)  # theirs

    def retrieve(self, found: Mapping[int, Retrieved]) -> None:
        """Add retrieved continuations, by request, before anything of the head."""
        if not found:
            return
        sizes = np.array([len(own.tokens) for own in found.values()])
        requests = np.array([*found])
        self._matches[requests] = [kinds.place_of_match(own.match) for own in found.values()]
        made = _nodes(np.repeat(requests, sizes))
        made["token"] = [*chain.from_iterable(own.tokens for own in found.values())]
        parents = np.array([*chain.from_iterable(own.parents for own in found.values())])
        roots = parents == ROOT
        parents += np.repeat(np.cumsum(sizes) - sizes, sizes)
        made["parent"] = parents = np.where(roots, ROOT, parents)
        joint = np.array([*chain.from_iterable(own.probabilities for own in found.values())])
        whole = np.where(roots, 1.0, joint[parents])
        made["odds"] = log_odds(np.log(np.clip(joint / np.maximum(whole, 1e-6), 0.02, 0.98)))
        made["depth"] = _depths(parents)
        made["kind"] = kinds.of_retrieved(self._matches[made["request"]], made["depth"])
        made["chance"] = self._chances(made["request"], made["odds"], made["kind"])
        self.nodes, self._found, self._best = made, len(made), None
        self._multiply()
        keys = self._keys_of(made["request"], parents, made["token"])
        self._places = np.argsort(keys, kind="stable")
        self._keys = keys[self._places]

    def _chances(self, requests: Ints, odds: Floats, of_kind: Ints) -> Floats:
        who = self._speaks[requests]
        return chances(self._slopes[who], odds, self._intercepts[who, of_kind])

    def _multiply(self) -> None:
        """Gains of retrieved nodes."""
        nodes = self.nodes[: self._found]
        gains, depths = nodes["chance"].copy(), nodes["depth"]
        for depth in range(2, int(depths.max(initial=1)) + 1):
            own = np.flatnonzero(depths == depth)
            gains[own] *= gains[nodes["parent"][own]]
        nodes["gain"] = gains

    def _keys_of(self, requests: Ints, parents: Ints, tokens: Ints) -> Ints:
        return (np.where(parents == ROOT, requests, len(self._limits) + parents) << 32) + tokens

    def grow_head(
        self,
        drafter: LevelDrafter,
        requests: Sequence[int],
        prices: Prices,
        following: Floats,
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
        asked = np.array(requests)
        roots = np.full(len(self._limits), -1)
        roots[asked] = np.arange(len(asked))
        self._extend(asked, np.full(len(asked), ROOT), *drafter.first())
        states = len(asked)
        for _ in range(levels - 1):
            budget, nodes = self.budget(prices), self.nodes
            if not len(nodes):
                return
            above = np.where(
                nodes["parent"] == ROOT, roots[nodes["request"]], nodes["state"][nodes["parent"]]
            )
            able = (nodes["state"] < 0) & (above >= 0) & (nodes["depth"] < self._room[nodes["request"]])
            hopes = nodes["gain"] * following[np.minimum(nodes["depth"], len(following) - 1)] - budget.price
            chosen = np.flatnonzero(able & (hopes > 0.0))
            if len(chosen) > width * len(asked):
                chosen = chosen[np.argsort(-hopes[chosen], kind="stable")[: width * len(asked)]]
            cost = prices.of_level(len(chosen))
            if not len(chosen) or hopes[chosen].sum() <= budget.rate * cost:
                return
            prices.spent += cost
            nodes["state"][chosen] = states + np.arange(len(chosen))
            states += len(chosen)
            found = drafter.expand(above[chosen], nodes["token"][chosen])
            self._extend(nodes["request"][chosen], chosen, *found)

    def _extend(self, requests: Ints, parents: Ints, log_probs: Floats, tokens: Ints) -> None:
        """Add the head's children of nodes or roots, [M, K], likeliest first. A NaN adds none of its row."""
        deeper = parents[0] != ROOT
        depths = self.nodes["depth"][parents] + 1 if deeper else np.ones_like(parents)
        finite = np.isfinite(log_probs).all(axis=1)
        self.spoiled.update(requests[~finite].tolist())
        usable = (depths <= self._room[requests]) & finite
        if not usable.all():
            requests, parents, depths = requests[usable], parents[usable], depths[usable]
            log_probs, tokens = log_probs[usable], tokens[usable]
        whole = self.nodes["gain"][parents] if deeper else np.ones(len(parents))
        width = log_probs.shape[1]
        made = _nodes(np.repeat(requests, width))
        made["parent"], made["depth"] = np.repeat(parents, width), np.repeat(depths, width)
        made["token"], made["odds"] = tokens.ravel(), log_odds(log_probs).ravel()
        made["kind"] = kinds.of_head(made["depth"])
        made["chance"] = self._chances(made["request"], made["odds"], made["kind"])
        made["gain"] = np.repeat(whole, width) * made["chance"]
        added = made["gain"] >= FLOOR
        if self._found:
            added &= ~self._agree(made)
        if deeper:
            self.nodes["best_child"][parents] = made["chance"].reshape(-1, width).max(axis=1)
        self.nodes, self._best = np.concatenate((self.nodes, made[added])), None

    def _agree(self, made: Any) -> Bools:
        """Where the head proposes a retrieved node too: that node is then both's, with the higher chance."""
        keys = self._keys_of(made["request"], made["parent"], made["token"])
        spots = np.minimum(np.searchsorted(self._keys, keys), self._found - 1)
        agreed = self._keys[spots] == keys
        if agreed.any():
            places, own = self._places[spots[agreed]], made[agreed]
            both = kinds.of_both(self._matches[own["request"]])
            nodes = self.nodes
            nodes["kind"][places], nodes["odds"][places] = both, own["odds"]
            likelier = np.maximum(nodes["chance"][places], self._chances(own["request"], own["odds"], both))
            nodes["chance"][places] = made["chance"][agreed] = likelier
            self._multiply()
        return agreed

    def regain(self, gains: Sequence[float]) -> None:
        """Other gains than were reckoned, [N]."""
        self.nodes["gain"], self._best = gains, None

    def best(self) -> Ints:
        """Places of candidates by falling gain, parents first, no more of a request than its limit."""
        if self._best is None:
            self._best = self._sort()
        return self._best

    def _sort(self) -> Ints:
        nodes = self.nodes
        usable = np.flatnonzero((nodes["gain"] >= FLOOR) & (nodes["depth"] <= self._room[nodes["request"]]))
        falling = usable[np.argsort(-nodes["gain"][usable], kind="stable")]
        requests = nodes["request"][falling]
        return falling[_rank(requests) < self._limits[requests]]

    def budget(self, prices: Prices) -> Budget:
        """The best number of nodes, given what has been spent."""
        gains = self.nodes["gain"][self.best()]
        return choose_budget(gains, prices.sampling, prices.of_nodes(len(gains)), prices.spent)

    def of_head(self) -> Any:
        """Candidates that the head alone proposes."""
        return self.nodes[kinds.come_from("head", self.nodes["kind"])]

    def saved_by_retrieval(self, budget: Budget) -> float:
        """Milliseconds that the chosen nodes save which only retrieval proposes."""
        chosen = self.nodes[self.best()[: budget.nodes]]
        own = kinds.come_from("retrieved", chosen["kind"])
        return float(np.maximum(chosen["gain"][own] - budget.price, 0.0).sum()) / budget.rate

    def trees(self, count: int) -> list[Tree]:
        """The best `count` nodes as one tree per request."""
        best = self.best()[:count]
        requests = self.nodes["request"][best]
        best = best[np.argsort(requests, kind="stable")]  # by request, and there as before
        chosen = self.nodes[best]
        counts = np.bincount(requests, minlength=len(self._limits))
        ends = np.cumsum(counts)
        position = np.full(len(self.nodes) + 1, ROOT)  # within its tree; the last is the root's
        position[best] = np.arange(len(best)) - np.repeat(ends - counts, counts)
        tokens, parents = chosen["token"].tolist(), position[chosen["parent"]].tolist()
        gains, of_kind = chosen["gain"].tolist(), chosen["kind"].tolist()
        return [
            Tree(tokens[a:b], parents[a:b], gains[a:b], of_kind[a:b])
            for a, b in pairwise([0, *ends.tolist()])
        ]

    def outcomes(self, said: Sequence[Sequence[int]]) -> Outcomes:
        """What came of all candidates, chosen or not: the text tells.

        Args:
            said: tokens that followed each root, by request; none where that is not known.
        """
        nodes, lengths = self.nodes, np.array([*map(len, said)], np.int64)
        reach = int(lengths.max(initial=0))
        text = np.full((len(lengths), reach), -1, np.int64)
        text[np.arange(reach) < lengths[:, None]] = [*chain.from_iterable(said)]
        tested, right = np.zeros(len(nodes), bool), np.zeros(len(nodes), bool)
        known = nodes["depth"] <= lengths[nodes["request"]]
        for depth in range(1, reach + 1):
            own = np.flatnonzero(known & (nodes["depth"] == depth))
            above = nodes["parent"][own]
            own = own[(above == ROOT) | right[above]]
            tested[own] = True
            right[own] = nodes["token"][own] == text[nodes["request"][own], depth - 1]
        chosen = nodes[tested]
        return Outcomes(chosen["request"], chosen["kind"], chosen["odds"], right[tested])


def _nodes(requests: Ints) -> Any:
    """Candidates of these requests, all else to be filled in."""
    made = np.zeros(len(requests), NODE)
    made["request"], made["state"] = requests, -1
    return made


def _depths(parents: Ints) -> Ints:
    """Of nodes, 1 under the root."""
    found, above = np.ones_like(parents), parents
    while (deeper := above != ROOT).any():
        found += deeper
        above = np.where(deeper, parents[above], ROOT)
    return found


def _rank(groups: Ints) -> Ints:
    """How many before each have the same group, [N]."""
    order = np.argsort(groups, kind="stable")
    ranked = groups[order]
    starts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1]))) if len(groups) else groups
    ranks = np.empty(len(groups), np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))
    return ranks
