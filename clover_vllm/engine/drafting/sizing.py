"""How much to speculate in a step: who is drafted for, and when drafting sleeps.

The head's candidates of the latest drafts are kept as a sample of what drafting finds. From it and the costs follows
what a batch of a given size would gain, before anything is drafted. If that is nothing, drafting sleeps, and tries
a request now and then. See `tree.budget`, `tree.calibration` and `tree.costs` for the three parts of the reckoning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from clover_vllm.engine.drafting.ledger import Habit, Ledger
from clover_vllm.tree.budget import Floats
from clover_vllm.tree.calibration import Calibration
from clover_vllm.tree.costs import Costs, StepSize
from clover_vllm.tree.forest import Forest, Prices
from clover_vllm.tree.kinds import KINDS, first_intercepts
from clover_vllm.tree.outcomes import Outcomes

SAMPLES = 48
"""Latest drafts that stand for what drafting finds."""

LOOK = 24
"""Steps at the start in which some requests are drafted for whatever it costs, to see what that gives."""

RETHINK_EVERY = 16
"""Steps after which the choice to draft or to sleep is made anew, if the batch stays about the same."""

CHANGE = 0.2
"""Share by which the number of requests must have changed for that choice to be made at once."""

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
class Sizer:
    """Learns costs and chances, and decides.

    Attributes:
        costs: of the engine.
        limit: most nodes per request.
        asleep: whether the head is not asked, but now and then.
        saved: milliseconds that drafting saves per request and step, as last reckoned.
        ledger, found: of what the head's nodes have really spent and saved, and of those that only retrieval proposed.
    """

    costs: Costs
    limit: int
    greedy: Calibration = field(default_factory=lambda: Calibration(KINDS, first_intercepts()))
    sampling: Calibration = field(default_factory=lambda: Calibration(KINDS, first_intercepts()))
    following: Floats = field(default_factory=lambda: np.full(MOST_LEVELS + 2, 0.6))
    asleep: bool = False
    saved: float = 0.0
    retrieving: Habit = field(default_factory=Habit)
    ledger: Ledger = field(default_factory=Ledger)
    found: Ledger = field(default_factory=Ledger)
    reading: float = 2.0  # positions that the head reads per request that it is asked for, lately
    # Gains and depths of the head's likeliest nodes, [nodes, 2], of the latest drafts.
    _samples: deque[Floats] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    _steps: int = 0
    _thought: tuple[int, int] = (0, -(10**9))  # requests and step of the last decision
    _probed: int = 0
    _passes: float = (
        0.0  # milliseconds of the head's passes of the latest draft; the augmenting block begins it
    )

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
        known: Floats = np.empty(0)

        def of_nodes(count: int) -> Floats:
            nonlocal known
            if len(known) < count + 1:
                known = self.costs.of_nodes(size, max(64, 2 * count), context) - prompts
            return known

        return Prices(sampling, of_nodes, self.costs.of_level)

    def rests(self, requests: int) -> bool:
        """Whether this step drafts for nobody, and nothing is to be found out in it. Counts it if so."""
        if not self.asleep or self._rethinks(requests, self._steps + 1) or self._probes(self._steps + 1):
            return False
        self._steps += 1
        self.ledger.forbids(requests)
        return True

    def _rethinks(self, requests: int, step: int) -> bool:
        known, thought = self._thought
        return abs(requests - known) > CHANGE * known or step - thought >= RETHINK_EVERY

    def _probes(self, step: int) -> bool:
        return step - self._probed >= PROBE_EVERY

    def looks(self, requests: int) -> bool:
        """Whether to look texts up in this step. Counts it."""
        return not self.found.forbids(requests) and self.retrieving.due()

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
        if self._steps <= LOOK:
            return able[:8]
        if self._rethinks(len(able), self._steps):
            self._thought = (len(able), self._steps)
            if self._samples:
                self._think(len(able), forest, prices)
            else:
                self.asleep = False  # for the ledger to say
        self.asleep |= self.ledger.forbids(len(wanted))
        if self.asleep:
            if not self._probes(self._steps):
                return []
            self._probed = self._steps
            return [able[self._steps // PROBE_EVERY % len(able)]]
        if not self._samples:
            return able[:8]
        sure = self._sure(forest)
        return [i for i in able if i not in sure and self._is_worth_reading(wanted[i])]

    def _sure(self, forest: Forest) -> set[int]:
        """Requests of which so much was retrieved that the head would add little."""
        if not len(forest.nodes):
            return set()
        promised = np.bincount(forest.nodes["request"], forest.nodes["gain"])
        usual = sum(float(own[:, 0].sum()) for own in self._samples) / len(self._samples)
        return set(np.flatnonzero(promised > max(1.0, SURE * usual)).tolist())

    def _think(self, requests: int, forest: Forest, prices: Prices) -> None:
        """Compare the best that drafting would give with what there is without."""
        without = forest.budget(prices)
        share = requests / len(self._samples)
        retrieved = forest.nodes["gain"][forest.best()]  # there in any case: of depth 0
        drafted = np.concatenate(self._samples)
        found = np.concatenate(
            (
                np.column_stack((retrieved, np.zeros_like(retrieved), np.ones_like(retrieved))),
                np.column_stack((drafted, np.full(len(drafted), share))),
            )
        )
        found = found[np.argsort(-found[:, 0], kind="stable")]
        base = prices.spent + self.costs.of_asking(requests)
        base += self.costs.of_augmenting(self.reading * requests) + self.costs.of_first(requests)
        best = (0.0, 0.0, 0.0)
        depths = found[:, 1]
        deepest = int(depths.max(initial=1))
        levels_ms = 0.0
        costs = prices.of_nodes(int(found[:, 2].sum()) + 1)
        places = np.arange(len(costs))
        for levels in range(1, deepest + 1):
            if levels > 1:
                width = share * int((depths == levels - 1).sum()) * 0.5
                levels_ms += self.costs.of_level(max(1.0, width))
                if levels not in (2, 3, deepest):
                    continue
            usable = found[depths <= levels]
            rows = np.concatenate(([0.0], np.cumsum(usable[:, 2])))
            milliseconds = np.interp(rows, places, costs) + base + levels_ms
            earned = prices.sampling + np.concatenate(([0.0], np.cumsum(usable[:, 0] * usable[:, 2])))
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

    def settle(
        self,
        ledger: Ledger,
        load: int,
        size: StepSize,
        emitting: int,
        nodes: int,
        accepted: int,
        drafting: float,
    ) -> None:
        """What a step for which somebody was asked, the head or retrieval, has brought.

        Args:
            ledger: of whom was asked.
            load: requests that could use a draft when it was chosen.
            size: of the step.
            emitting: its requests that sampled.
            nodes: of theirs alone, verified in it.
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
        ledger.record(load, drafting + self.costs.of_step(size) - self.costs.of_step(without), spared)

    def learn_pass(self, part: str, rows: int, milliseconds: float) -> None:
        """A pass of the head, see `Costs.learn_drafting`."""
        self.costs.learn_drafting(part, rows, milliseconds)
        self._passes = milliseconds + (self._passes if part != "augment" else 0.0)

    def learn_draft(self, forest: Forest, asked: Sequence[int], read: int, milliseconds: float) -> None:
        """Keep what drafting has found as a sample of what it finds, and what it took.

        Args:
            forest: grown.
            asked: its requests that the head was asked for.
            read: positions.
            milliseconds: all in all, look-ups left out.
        """
        self.costs.learn_drafting("asking", len(asked), max(0.0, milliseconds - self._passes))
        self.reading += 0.05 * (min(4.0, read / len(asked)) - self.reading)
        nodes = forest.nodes
        expanded = nodes[nodes["state"] >= 0]
        for depth in np.unique(expanded["depth"]).tolist():
            of_depth = expanded["best_child"][expanded["depth"] == depth]
            kept = 0.98 ** len(of_depth)
            self.following[depth:] = kept * self.following[depth:] + (1.0 - kept) * of_depth.mean()
        own = forest.of_head()
        for r in asked[:8]:
            mine = own[own["request"] == r]
            best = np.argsort(-mine["gain"], kind="stable")[:12]
            self._samples.append(np.column_stack((mine["gain"][best], mine["depth"][best])))

    def learn_outcomes(self, seen: Outcomes, kinds: Sequence[int]) -> None:
        """What came of the candidates of a step.

        Args:
            seen: of all of them.
            kinds: by request: 0 takes the most likely tokens, 1 samples, -1 says nothing.
        """
        kind_of = np.array(kinds)[seen.requests]
        for kind, calibration in enumerate((self.greedy, self.sampling)):
            own = kind_of == kind
            calibration.learn(seen.odds[own], seen.kinds[own], seen.said[own])
