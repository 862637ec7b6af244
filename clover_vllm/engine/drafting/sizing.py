"""How much to speculate in a step: who is drafted for, and when drafting sleeps.

The head's candidates of the latest drafts are kept as a sample of what drafting finds. From it and the costs follows
what a batch of a given size would gain, before anything is drafted. If that is nothing, drafting sleeps, and tries
a request now and then. See `tree.budget`, `tree.calibration` and `tree.costs` for the three parts of the reckoning.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from clover_vllm.engine.drafting.ledger import Ledger
from clover_vllm.tree import ROOT, Tree
from clover_vllm.tree.calibration import Calibration
from clover_vllm.tree.costs import Costs, StepSize
from clover_vllm.tree.forest import KINDS, Forest, Prices, first_intercepts

SAMPLES = 48
"""Latest drafts that stand for what drafting finds."""

LOOK = 24
"""Steps at the start in which some requests are drafted for whatever it costs, to see what that gives."""

RETHINK_EVERY = 16
"""Steps after which the choice to draft or to sleep is made anew, if the batch stays the same."""

RETRIEVE_EVERY = 16
"""Steps between two tries to look texts up while that does not pay."""

SURE = 1.2
"""Accepted tokens that retrieved drafts promise, over what drafting usually gives, from which on the head is not asked."""

PROBE_EVERY = 48
"""Steps between two tries while asleep."""

WAKE, SLEEP = 1.06, 1.03
"""Expected speed over that without the head at which drafting begins, and below which it ends: prompts that the head
must read are not in it."""

READING_PAYS = 2.0
"""What drafting for a request must save over the price of reading its backlog: it may end sooner than it could."""

LIFE = 48
"""Steps over which the price of reading a backlog is spread, at most."""

MOST_LEVELS = 12


@dataclass
class Wanted:
    """A request that can use a draft in the next step."""

    r: int  # of the batch
    room: int  # nodes on a path that can still be accepted
    cached: int  # positions in its cache
    pending: int | None  # of them, those that the head would have to read; None: it cannot
    sampled: bool  # rather than the most likely token


@dataclass
class Habit:
    """Whether looking texts up saves more than it takes; while it does not, a try now and then."""

    saved: float = 1.0  # milliseconds per look-up, lately
    taken: float = 0.05
    resting: bool = False
    _waited: int = 0

    def due(self) -> bool:
        """Whether to look up in this step."""
        if not self.resting:
            return True
        self._waited = (self._waited + 1) % RETRIEVE_EVERY
        return self._waited == 0

    def learn(self, saved: float, taken: float) -> None:
        """What a look-up saved and took, on average over a step's."""
        self.saved += 0.05 * (saved - self.saved)
        self.taken += 0.05 * (min(taken, 4.0 * self.taken) - self.taken)
        self.resting = self.saved < self.taken * (1.5 if self.resting else 1.0)


@dataclass
class Sizer:
    """Learns costs and chances, and decides.

    Attributes:
        costs: of the engine.
        limit: most nodes per request.
        asleep: whether the head is not asked, but now and then.
        saved: milliseconds that drafting saves per request and step, as last reckoned.
        ledger: of what drafting has really spent and saved.
    """

    costs: Costs
    limit: int
    greedy: Calibration = field(default_factory=lambda: Calibration(KINDS, first_intercepts()))
    sampling: Calibration = field(default_factory=lambda: Calibration(KINDS, first_intercepts()))
    following: list[float] = field(default_factory=lambda: [0.6] * (MOST_LEVELS + 2))
    asleep: bool = False
    saved: float = 0.0
    retrieving: Habit = field(default_factory=Habit)
    ledger: Ledger = field(default_factory=Ledger)
    _samples: deque[list[tuple[float, int]]] = field(
        default_factory=lambda: deque(maxlen=SAMPLES)
    )  # gain, depth
    _steps: int = 0
    _thought: tuple[int, int] = (0, -(10**9))  # requests and step of the last decision
    _probed: int = 0

    def calibration(self, wanted: Wanted) -> Calibration:
        """That of requests of this one's kind."""
        return self.sampling if wanted.sampled else self.greedy

    def forest(self, wanted: Sequence[Wanted]) -> Forest:
        """An empty forest for these requests."""
        return Forest(
            [self.limit] * len(wanted), [w.room for w in wanted], [self.calibration(w) for w in wanted]
        )

    def prices(self, wanted: Sequence[Wanted], sampling: int, prompt_rows: int, cached: int) -> Prices:
        """What nodes and levels cost in the next step.

        What its prompts cost is left out: it is spent whatever is drafted, and time that drafts save is worth what it
        gives in a step that only decodes.

        Args:
            wanted: requests that could have nodes.
            sampling: requests that will sample.
            prompt_rows: rows of prompts beside them.
            cached: positions that the step reads.
        """
        size = StepSize(sampling + prompt_rows, sampling, cached)
        prompts = self.costs.of_step(size) - self.costs.of_step(StepSize(sampling, sampling, cached))
        context = sum(w.cached for w in wanted) / max(1, len(wanted))
        known: list[float] = []

        def of_nodes(count: int) -> list[float]:
            if len(known) < count + 1:
                known[:] = (self.costs.of_nodes(size, max(64, 2 * count), context) - prompts).tolist()
            return known

        return Prices(sampling, of_nodes, self.costs.of_level)

    def choose(self, wanted: Sequence[Wanted], forest: Forest, prices: Prices) -> list[int]:
        """Which of the wanted to ask the head for, by their place among them.

        Args:
            wanted: requests that can use a draft.
            forest: what has been retrieved for them.
            prices: of the step.
        """
        self._steps += 1
        able = [i for i, w in enumerate(wanted) if w.pending is not None]
        if not able:
            return []
        if self._steps <= LOOK or not self._samples:
            return able[:8]
        requests, step = self._thought
        if len(able) != requests or self._steps - step >= RETHINK_EVERY:
            self._thought = (len(able), self._steps)
            self._think(len(able), forest, prices)
        self.asleep |= self.ledger.forbids(prices.sampling)
        if self.asleep:
            if self._steps - self._probed < PROBE_EVERY:
                return []
            self._probed = self._steps
            return sorted(able, key=lambda i: (wanted[i].pending, i))[:1]
        sure = self._sure(forest)
        return [i for i in able if i not in sure and self._is_worth_reading(wanted[i])]

    def _sure(self, forest: Forest) -> set[int]:
        """Requests of which so much was retrieved that the head would add little."""
        promised: dict[int, float] = {}
        for c in forest.candidates:
            promised[c.request] = promised.get(c.request, 0.0) + c.gain
        if not promised:
            return set()
        usual = sum(sum(gain for gain, _ in own) for own in self._samples) / len(self._samples)
        return {request for request, sum_ in promised.items() if sum_ > max(1.0, SURE * usual)}

    def _think(self, requests: int, forest: Forest, prices: Prices) -> None:
        """Compare the best that drafting would give with what there is without."""
        without = forest.budget(prices)
        found = np.array([node for own in self._samples for node in own] or [(0.0, 1)])
        found = found[np.argsort(-found[:, 0], kind="stable")]
        share = requests / len(self._samples)
        base = self.costs.of_augmenting(requests) + self.costs.of_first(requests)
        best = (0.0, 0.0, 0.0)
        deepest = int(found[:, 1].max(initial=1))
        levels_ms = 0.0
        costs = np.array(prices.of_nodes(int(share * len(found)) + 1))
        places = np.arange(len(costs))
        for levels in range(1, deepest + 1):
            if levels > 1:
                width = share * int((found[:, 1] == levels - 1).sum()) * 0.5
                levels_ms += self.costs.of_level(max(1.0, width))
                if levels not in (2, 3, deepest):
                    continue
            usable = found[found[:, 1] <= levels, 0]
            milliseconds = np.interp(share * np.arange(len(usable) + 1), places, costs) + base + levels_ms
            earned = prices.sampling + share * np.concatenate(([0.0], np.cumsum(usable)))
            rates = earned / milliseconds
            i = int(np.argmax(rates))
            best = max(best, (float(rates[i]), float(milliseconds[i]), float(earned[i])))
        rate, spent, tokens = best
        gained = rate / without.rate
        self.asleep = gained < (WAKE if self.asleep else SLEEP)
        self.saved = max(0.0, tokens / without.rate - spent) / requests

    def _is_worth_reading(self, wanted: Wanted) -> bool:
        """Whether drafting for a request saves more, until it ends, than reading what the head has missed."""
        assert wanted.pending is not None
        if wanted.pending <= 8:
            return True
        cost = self.costs.of_augmenting(wanted.pending) - self.costs.of_augmenting(1)
        return self.saved * min(LIFE, wanted.room) > READING_PAYS * cost

    def settle(self, size: StepSize, emitting: int, nodes: int, accepted: int, drafting: float) -> None:
        """What a step for which the head was asked has brought.

        Args:
            size: of the step.
            emitting: its requests that sampled.
            nodes: of the head's, verified in it.
            accepted: of those.
            drafting: milliseconds before it.
        """
        if not emitting or self._steps <= LOOK + 1:
            return
        per_node = size.crossed / max(1, size.sampled - emitting)
        without = StepSize(
            size.rows - nodes, size.sampled - nodes, size.cached, size.crossed - nodes * per_node
        )
        plain = StepSize(emitting, emitting, size.cached)
        spared = accepted / emitting * (self.costs.of_step(plain) + self.costs.outside)
        self.ledger.record(
            emitting, drafting + self.costs.of_step(size) - self.costs.of_step(without), spared
        )

    def learn_draft(self, forest: Forest, asked: Sequence[int]) -> None:
        """Keep what drafting has found as a sample of what it finds.

        Args:
            forest: grown.
            asked: its requests that the head was asked for.
        """
        own: dict[int, list[tuple[float, int]]] = {r: [] for r in asked[:8]}
        for c in forest.candidates:
            if c.request in own:
                own[c.request].append((c.gain, c.depth))
            if c.state >= 0:
                for depth in range(c.depth, len(self.following)):
                    self.following[depth] += 0.02 * (c.best_child - self.following[depth])
        for nodes in own.values():
            self._samples.append(heapq.nlargest(12, nodes))

    def learn_outcomes(
        self, trees: Sequence[Tree | None], accepted: Sequence[Sequence[int]], kinds: Sequence[int]
    ) -> None:
        """What came of the trees of a step.

        Args:
            trees: by request.
            accepted: nodes, by request.
            kinds: by request: 0 took the most likely tokens, 1 sampled, -1 says nothing.
        """
        for tree, nodes, own in zip(trees, accepted, kinds, strict=True):
            if tree is None or own < 0 or not tree.signals:
                continue
            calibration = self.sampling if own else self.greedy
            for node, (parent, (kind, odds)) in enumerate(zip(tree.parents, tree.signals, strict=True)):
                if parent == ROOT or parent in nodes:
                    calibration.learn(odds, kind, node in nodes)
