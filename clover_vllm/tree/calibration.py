"""What a draft node's probability is worth: the chance that the target accepts it, learnt while serving."""

from __future__ import annotations

import numpy as np

from clover_vllm.tree.budget import Bools, Floats, Ints

WINDOW = 8192
"""Latest outcomes that count."""

EVERY = 512
"""Outcomes between two fits, at most: at the start a fit follows an eighth more, or 64."""

AT_ONCE = 256
"""Outcomes of a step that are kept; of more, one in two, three, ..., not always the same ones."""

CLAMP = 8.0
"""Log-odds are cut to -8 and 8: no probability of a drafter is a certainty."""

_RIDGE = 4.0  # pulls towards the values at the start, as this many outcomes of even odds would
_DAMPING = 50.0  # outcomes at which a Newton step is half as long


def log_odds(log_probs: Floats) -> Floats:
    """Of log-probabilities, clamped; of a NaN the lowest."""
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = log_probs - np.log(-np.expm1(np.minimum(log_probs, 0.0)))
    return np.clip(np.where(np.isnan(log_probs), -CLAMP, odds), -CLAMP, CLAMP)


def chances(slopes: Floats | float, odds: Floats, intercepts: Floats) -> Floats:
    """Of acceptance, by log-odds and what calibration has learnt."""
    return 1.0 / (1.0 + np.exp(-slopes * odds - intercepts))


class Calibration:
    """sigmoid(slope * log-odds + intercept of the node's kind), fitted by damped Newton steps.

    What is predicted is the chance of a node whose parent was accepted; a path's chance is the product along it.
    Candidates teach whether they were verified or not, since the text says what followed: a source that is trusted too
    little would else not be verified, and never be found to be better.
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
        self._odds = np.zeros(WINDOW)
        self._kinds = np.zeros(WINDOW, dtype=np.int64)
        self._accepted = np.zeros(WINDOW)
        self._seen = self._fitted = self._steps = 0

    def __call__(self, odds: Floats, kinds: Ints) -> Floats:
        """Chances of acceptance of nodes with these log-odds."""
        return chances(self.slope, odds, self.intercepts[kinds])

    def learn(self, odds: Floats, kinds: Ints, accepted: Bools) -> None:
        """The outcomes of candidates whose parents the target has said, each [N]."""
        apart = max(1, -(-len(odds) // AT_ONCE))
        self._steps += 1
        chosen = slice(self._steps % apart, None, apart)  # siblings stand in falling order
        odds, kinds, accepted = odds[chosen], kinds[chosen], accepted[chosen]
        places = (self._seen + np.arange(len(odds))) % WINDOW
        self._odds[places], self._kinds[places], self._accepted[places] = odds, kinds, accepted
        self._seen += len(odds)
        if self._seen - self._fitted >= min(EVERY, max(64, self._fitted // 8)):
            self._fitted = self._seen
            self._fit()

    def _fit(self) -> None:
        """One Newton step on all that is remembered. The Hessian is an arrowhead: solved by its Schur complement."""
        count = min(self._seen, WINDOW)
        x, kinds = self._odds[:count], self._kinds[:count]
        expected = self(x, kinds)
        weights, errors = expected * (1.0 - expected), self._accepted[:count] - expected
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
