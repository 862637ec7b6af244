"""What a draft node's probability is worth: the chance that the target accepts it, learnt while serving."""

from __future__ import annotations

import math

import numpy as np

from clover_vllm.tree.budget import Floats, Ints

WINDOW = 4096
"""Latest outcomes that count."""

EVERY = 128
"""Outcomes between two fits."""

CLAMP = 8.0
"""Log-odds are cut to -8 and 8: no probability of a drafter is a certainty."""

_RIDGE = 4.0  # pulls towards the values at the start, as this many outcomes of even odds would
_DAMPING = 50.0  # outcomes at which a Newton step is half as long


def log_odds(log_prob: float) -> float:
    """Of a log-probability, clamped; of a NaN the lowest."""
    if not log_prob < -1e-12:
        return CLAMP if log_prob >= -1e-12 else -CLAMP
    odds = log_prob - math.log(-math.expm1(log_prob))
    return min(max(odds, -CLAMP), CLAMP)


class Calibration:
    """sigmoid(slope * log-odds + intercept of the node's kind), fitted by damped Newton steps.

    What is predicted is the chance of a node whose parent was accepted; a path's chance is the product along it.
    The kind of a node tells where it comes from and how deep it is. One instance serves requests that take the most
    likely token, another those that sample. Requests whose logits are changed before sampling teach it nothing.
    """

    def __init__(self, kinds: int, intercepts: Floats | None = None) -> None:
        """
        Args:
            kinds: number of kinds of nodes.
            intercepts: [kinds] to start from, by default 0.
        """
        self.slope = 1.0
        self.intercepts = np.zeros(kinds) if intercepts is None else intercepts.astype(np.float64)
        self._start = self.intercepts.copy()
        self._quick: list[float] = self.intercepts.tolist()
        self._odds = np.zeros(WINDOW)
        self._kinds = np.zeros(WINDOW, dtype=np.int64)
        self._accepted = np.zeros(WINDOW)
        self._seen = self._fitted = 0

    def __call__(self, odds: float, kind: int) -> float:
        """Chance of acceptance of a node with these log-odds."""
        return 1.0 / (1.0 + math.exp(-self.slope * odds - self._quick[kind]))

    def learn(self, odds: float, kind: int, accepted: bool) -> None:
        """The outcome of a node whose parent was accepted."""
        place = self._seen % WINDOW
        self._odds[place], self._kinds[place], self._accepted[place] = odds, kind, accepted
        self._seen += 1
        if self._seen - self._fitted >= EVERY:
            self._fitted = self._seen
            self._fit()

    def _chances(self, odds: Floats, kinds: Ints) -> Floats:
        return 1.0 / (1.0 + np.exp(-self.slope * odds - self.intercepts[kinds]))

    def _fit(self) -> None:
        """One Newton step on all that is remembered. The Hessian is an arrowhead: solved by its Schur complement."""
        count = min(self._seen, WINDOW)
        x, kinds = self._odds[:count], self._kinds[:count]
        chances = self._chances(x, kinds)
        weights, errors = chances * (1.0 - chances), self._accepted[:count] - chances
        number = len(self.intercepts)
        ridge = _RIDGE / 4.0
        down = np.bincount(kinds, errors, number) - ridge * (self.intercepts - self._start)
        diagonal = np.bincount(kinds, weights, number) + ridge
        cross = np.bincount(kinds, weights * x, number)
        slope_gradient = float(errors @ x) - ridge * (self.slope - 1.0)
        corner = float(weights @ (x * x)) + ridge - float(cross @ (cross / diagonal))
        slope_step = (slope_gradient - float(cross @ (down / diagonal))) / max(corner, 1e-6)
        damping = count / (count + _DAMPING)
        self.slope = float(np.clip(self.slope + damping * slope_step, 0.05, 3.0))
        self.intercepts += damping * np.clip((down - cross * slope_step) / diagonal, -2.0, 2.0)
        self._quick = self.intercepts.tolist()
