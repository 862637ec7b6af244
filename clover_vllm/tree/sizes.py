"""One size for all trees of a step, where drafts stay on a device: chosen a step ahead, by what sizes cost and earn.

The host sees of a step how long it took and how many tokens each request got. What a size costs is learnt by size and
number of requests; what it earns is a level, which follows the text, times a shape over sizes, which hardly moves.
A size that was never tried is reckoned from its neighbours, and the neighbours of the best are tried now and then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LADDER = (0, 1, 2, 4, 8, 16, 32)
"""Sizes that are tried: CUDA graphs like few shapes."""

PROBE_STEPS = 2
PROBED_DRAFTS = 16
"""Steps for which a neighbour is tried, and drafted requests after which the trial ends earlier."""

PROBE_EVERY = 128
PROBE_SHARE = 0.005
"""Steps after which it is tried at the earliest, and the largest share of the time that trials take."""

FLAT = 256.0
"""Rows that double what a step costs, until it was measured."""

DRAFTING = 0.08
"""Share of a step that drafting takes, until it was measured."""

FIRST_LEVEL = 0.6
"""Accepted nodes per request with trees of one node, until they were seen."""

FADING = 0.99
"""Of what was accepted, with each step, so that a rare try counts where nothing else is seen."""

_STEPS, _LEVEL, _SHAPE = 8.0, 64.0, 8192.0
"""What is remembered: of a cost steps, of the level drafts (per request of a step), of the shape drafts."""


@dataclass
class _Mean:
    """A mean that forgets."""

    value: float
    weight: float = 0.0

    def add(self, value: float, weight: float, window: float) -> None:
        self.weight = min(self.weight + weight, max(window, weight))
        self.value += weight / self.weight * (value - self.value)


def ladder_to(most: int) -> tuple[int, ...]:
    """Sizes up to `most`, rising, 0 and `most` among them."""
    return (*(size for size in LADDER if size < most), most)


class Sizes:
    """Chooses the number of nodes that each request of a step drafts."""

    def __init__(self, ladder: Sequence[int]) -> None:
        """ladder: sizes to choose from, rising from 0."""
        assert ladder[0] == 0
        self.ladder = tuple(ladder)
        self._costs: dict[tuple[int, int], _Mean] = {}  # milliseconds, by size and class of requests
        self._level = _Mean(FIRST_LEVEL, 8.0)
        self._shape = {size: _Mean(math.log2(1 + size), _SHAPE / 8) for size in self.ladder}
        self._used = dict.fromkeys(self.ladder, 0)  # step at which each was last chosen
        self._step = self._probed = 0
        self._probe, self._probe_left = 0, 0

    def choose(self, requests: int) -> int:
        """Nodes that each of `requests` requests drafts for the next step."""
        self._step += 1
        self._level.weight *= FADING
        size = self._probe
        if self._probe_left:
            self._probe_left -= 1
        else:
            rates = {size: self.rate(size, requests) for size in self.ladder}
            size = max(rates, key=rates.__getitem__)
            probe = self._neighbour(size)
            steps = max(PROBE_STEPS, math.ceil(PROBED_DRAFTS / requests))
            lost = steps * self.cost(probe, requests) / self.cost(size, requests)
            lost *= max(0.0, 1.0 - rates[probe] / rates[size])
            if self._step - self._probed >= max(PROBE_EVERY, lost / PROBE_SHARE):
                self._probed, self._probe_left = self._step + steps, steps - 1
                size = self._probe = probe
        self._used[size] = self._step
        return size

    def saw_step(self, requests: int, size: int, milliseconds: float) -> None:
        """What a step took in which all requests verified `size` nodes, with the drafting before it."""
        if size not in self._shape:  # the scheduler has cut the trees
            return
        cost = self._costs.get((size, _class(requests)))
        if cost is None:
            self._costs[size, _class(requests)] = _Mean(milliseconds, 1.0)
        elif cost.weight < 3.0:  # the first ones may have compiled something
            cost.add(min(cost.value, milliseconds), 1.0, _STEPS)
            cost.value = min(cost.value, milliseconds)
        else:
            cost.add(min(milliseconds, 3.0 * cost.value), 1.0, _STEPS)

    def saw_drafts(self, requests: int, size: int, accepted: int) -> None:
        """How many nodes were accepted in all of `requests` requests that verified `size` each."""
        if size not in self._shape or not size:
            return
        shape, seen = self._shape[size], accepted / requests
        self._level.add(seen / shape.value, requests, max(_LEVEL, _LEVEL * requests))
        if self._level.value > 0.05:
            shape.add(seen / self._level.value, requests, _SHAPE)

    def gain(self, size: int) -> float:
        """Accepted nodes per request that are expected."""
        return self._level.value * self._shape[size].value

    def cost(self, size: int, requests: int) -> float:
        """Milliseconds that are expected of a step."""
        known = self._costs.get((size, _class(requests)))
        if known is not None:
            return known.value
        index = self.ladder.index(size)

        def distance(key: tuple[int, int]) -> tuple[int, int]:
            return abs(key[1] - _class(requests)), abs(self.ladder.index(key[0]) - index)

        if not self._costs:
            return _work(size, requests)
        near = min(self._costs, key=distance)
        return self._costs[near].value * _work(size, requests) / _work(near[0], 2.0 ** (near[1] / 2))

    def rate(self, size: int, requests: int) -> float:
        """Tokens per request and millisecond that are expected."""
        return (1.0 + self.gain(size)) / self.cost(size, requests)

    def _neighbour(self, size: int) -> int:
        """Of the next smaller and the next larger size, the one that was not chosen for longer."""
        index = self.ladder.index(size)
        near = [*self.ladder[max(index - 1, 0) : index], *self.ladder[index + 1 : index + 2]]
        return min(near, key=self._used.__getitem__)


def _class(requests: int) -> int:
    """Numbers of requests that cost about the same: half octaves."""
    return round(2 * math.log2(requests))


def _work(size: int, requests: float) -> float:
    """What a step costs in comparison, before anything was measured."""
    return (1.0 + requests * (1 + size) / FLAT) * (1.0 + DRAFTING * (size > 0))
