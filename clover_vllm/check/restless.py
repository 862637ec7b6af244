"""Adaptive drafting without its good reasons: it sleeps, wakes and sizes trees at random. Text must stay the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np


class Restless:
    """Replaces an adaptive runner's choices by random ones.

    Attributes:
        slept, asked: steps in which no request was drafted for though some could be, and requests drafted for.
        sizes: numbers of nodes chosen for a step.
    """

    def __init__(self, runner: Any, seed: int) -> None:
        """
        Args:
            runner: a `CloverRunner` with adaptive trees.
            seed: of the choices.
        """
        self._rng = random.Random(seed)
        self._asleep = 0
        self.slept = self.asked = 0
        self.sizes: set[int] = set()
        sizer = runner.speculation.sizer
        self._prices = sizer.prices
        self._trees_of = sizer.forest
        sizer.choose, sizer.prices, sizer.forest = self._choose, self._random_prices, self._forest
        sizer.rests = lambda _: False
        sizer.looks = lambda _: self._rng.random() < 0.7
        if (retrieval := runner.speculation.retrieval) is not None:
            retrieval.longest_pause = 0

    def _choose(self, wanted: Sequence[Any], forest: Any, prices: Any) -> list[int]:
        del forest, prices
        able = [i for i, w in enumerate(wanted) if w.pending is not None]
        if self._asleep == 0 and self._rng.random() < 0.2:
            self._asleep = self._rng.randrange(1, 12)
        if self._asleep:
            self._asleep -= 1
            self.slept += bool(able)
            return []
        chosen = [i for i in able if self._rng.random() < 0.8]
        self.asked += len(chosen)
        return chosen

    def _random_prices(self, *args: Any) -> Any:
        made = self._prices(*args)
        row, base = self._rng.choice([0.0, 0.01, 0.1, 1.0]), self._rng.uniform(1.0, 20.0)
        level = self._rng.choice([0.0, 0.1, 100.0])
        made.of_nodes = lambda count: base + row * np.arange(count + 8.0)
        made.of_level = lambda _: level
        return made

    def _forest(self, wanted: Sequence[Any]) -> Any:
        made = self._trees_of(wanted)
        original = made.trees

        def trees(count: int) -> Any:
            self.sizes.add(count)
            return original(count)

        made.trees = trees
        return made
