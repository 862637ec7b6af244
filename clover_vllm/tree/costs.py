"""What a step costs: milliseconds by rows and cached tokens, measured at start-up and learnt from every step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clover_vllm.tree.budget import Floats

GRID = np.array(
    [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192],
    dtype=np.float64,
)
"""Rows at which curves have a point of their own."""

_ROWS = GRID.tolist()

LEARNING = 0.1
"""Share of a surprise by which a curve's nearest points move."""

LONG = 128
"""Rows from which on a step with prompts teaches the curve of rows: fewer are the business of steps that decode."""

DRAFTING = 0.2
"""The same for drafting, which may be seen rarely."""

DRIFT = 0.1
"""Share of a surprise that counts as the whole machine having become faster or slower."""

SLOPE, FURTHEST = 0.02, 4.0
"""Share of a surprise that counts against what distinguishes a step from those before it; and how far that may take a
cost from what was measured at start-up."""


class Curve:
    """Milliseconds by rows: never falling, straight between the points of `GRID`, straight on behind the last."""

    def __init__(self, measured: Mapping[float, float]) -> None:
        """measured: milliseconds by rows, at least one pair."""
        rows = np.array(sorted(measured), dtype=np.float64)
        # Noise only ever adds: no number of rows costs more than a larger one did.
        values = np.minimum.accumulate(np.array([measured[r] for r in rows])[::-1])[::-1]
        points = np.interp(GRID, rows, values)
        if len(rows) > 1 and rows[-1] > rows[0]:
            slope = (values[-1] - values[-2]) / (rows[-1] - rows[-2])
            points += np.maximum(GRID - rows[-1], 0.0) * slope
        self._points = points
        self._show()

    def _show(self) -> None:
        self._shown = _monotone(self._points)
        self._list = self._shown.tolist()

    def __call__(self, rows: Floats) -> Floats:
        """Milliseconds, [N], of [N] numbers of rows; 0 rows cost as much as 1."""
        found = np.interp(rows, GRID, self._shown)
        beyond = np.maximum(rows - GRID[-1], 0.0)
        if beyond.any():
            found = found + beyond * (self._shown[-1] - self._shown[-2]) / (GRID[-1] - GRID[-2])
        return found

    def at(self, rows: float) -> float:
        """Milliseconds of one number of rows."""
        right = min(max(bisect_right(_ROWS, rows), 1), len(_ROWS) - 1)
        low, high = self._list[right - 1], self._list[right]
        share = (rows - _ROWS[right - 1]) / (_ROWS[right] - _ROWS[right - 1])
        return low + max(share, 0.0) * (high - low)

    def learn(self, rows: float, surprise: float, learning: float = LEARNING) -> None:
        """Move towards what was observed: `surprise` milliseconds more than `at(rows)`."""
        right = min(max(bisect_right(_ROWS, rows), 1), len(_ROWS) - 1)
        left = right - 1
        share = min(max((rows - _ROWS[left]) / (_ROWS[right] - _ROWS[left]), 0.0), 1.0)
        for point, part in ((left, 1.0 - share), (right, share)):
            self._points[point] = max(1e-3, self._points[point] + learning * part * surprise)
        self._show()

    def points(self) -> dict[float, float]:
        """As `__init__` takes them."""
        return {float(r): float(v) for r, v in zip(GRID, self._points, strict=True)}


def _monotone(points: Floats) -> Floats:
    """The nearest curve that never falls, roughly: between the lowest above and the highest below."""
    return (np.maximum.accumulate(points) + np.minimum.accumulate(points[::-1])[::-1]) / 2.0


@dataclass(frozen=True)
class StepSize:
    """What decides how long a step takes."""

    rows: int  # of the target's forward: prompt chunks, roots and nodes
    sampled: int  # roots and nodes, whose logits are computed
    cached: int  # cached tokens that are read, summed over requests
    crossed: float = 0.0  # pairs of a node and a cached token, summed over requests


@dataclass
class Costs:
    """All costs of an engine, in milliseconds."""

    forward: Curve  # of the target, by rows
    logits: Curve  # of the lm_head and sampling, by sampled rows
    augment: Curve  # of the head's augmenting block, by rows
    first: Curve  # of the first level, by requests
    level: Curve  # of a further level, by nodes
    cached: float  # per cached token that is read
    crossed: float  # per pair of a node and a cached token
    # What asking the head takes besides its passes, by requests. Not timed at start-up, but learnt.
    asking: Curve = field(default_factory=lambda: Curve({1.0: 0.5, 64.0: 3.0}))
    outside: float = 1.0  # between two steps: scheduling, output
    speed: float = 1.0  # of the machine now, over what the curves say
    steepness: float = 1.0  # of what further rows cost, over what the curves say
    _usual: Floats | None = None  # what steps do, on average: see `_doing`
    _spread: Floats = field(default_factory=lambda: np.zeros(3))

    def __post_init__(self) -> None:
        self._measured = self.cached, self.crossed

    def of_step(self, size: StepSize) -> float:
        """Milliseconds of a step itself, without drafting and what passes between two steps."""
        return self.speed * self._inner(size)

    def _inner(self, size: StepSize) -> float:
        rows, cached, crossed = self._doing(size)
        return self._least() + self.steepness * rows + self.cached * cached + self.crossed * crossed

    def _least(self) -> float:
        return self.forward.at(1) + self.logits.at(1)

    def _doing(self, size: StepSize) -> tuple[float, int, float]:
        """What a step does beyond its least: milliseconds of further rows by the curves, and what it reads."""
        rows = self.forward.at(size.rows) + self.logits.at(size.sampled) - self._least()
        return rows, size.cached, size.crossed

    def of_nodes(self, size: StepSize, most: int, context: float) -> Floats:
        """Milliseconds of a step with 0 to `most` nodes added, [most + 1].

        Args:
            size: of the step without nodes.
            most: nodes.
            context: cached tokens that a node reads, on average.
        """
        nodes = np.arange(most + 1, dtype=np.float64)
        least = self._least()
        inner = (
            least
            + self.steepness * (self.forward(size.rows + nodes) + self.logits(size.sampled + nodes) - least)
            + self.cached * size.cached
            + self.crossed * (size.crossed + nodes * context)
        )
        return self.speed * inner + self.outside

    def of_augmenting(self, rows: float) -> float:
        """Milliseconds of the augmenting block."""
        return self.speed * self.augment.at(rows)

    def of_asking(self, requests: float) -> float:
        """Milliseconds of drafting for some requests besides the head's passes."""
        return self.speed * self.asking.at(requests)

    def of_first(self, requests: float) -> float:
        """Milliseconds of the first level."""
        return self.speed * self.first.at(requests)

    def of_level(self, nodes: float) -> float:
        """Milliseconds of a further level that expands this many nodes."""
        return self.speed * self.level.at(nodes)

    def learn_step(self, size: StepSize, milliseconds: float) -> None:
        """A step took this long, time outside of it left out.

        The curves keep the form that was timed at start-up, at one moment, alone: served steps are of few sizes, and
        between two sizes the machine's speed may have changed. They teach the speed, and by how they differ from the
        steps just before them what rows and reading cost.
        """
        expected = self.of_step(size)
        observed = min(milliseconds, 2.0 * expected)  # a hiccup of the machine is no cost of rows
        if size.rows > size.sampled:
            if size.rows >= LONG:
                surprise = observed / self.speed - self._inner(size)
                self.forward.learn(size.rows, surprise / self.steepness)
            return
        self.speed *= float(np.clip(observed / expected, 0.5, 2.0)) ** DRIFT
        self._learn_slopes(size, observed / self.speed - self._inner(size))

    def _learn_slopes(self, size: StepSize, surprise: float) -> None:
        doing = np.array(self._doing(size), dtype=np.float64)
        if self._usual is None:
            self._usual, self._spread = doing, doing**2
        moved = doing - self._usual
        self._usual = self._usual + 0.02 * moved
        self._spread += 0.02 * (moved**2 - self._spread)
        step = SLOPE * surprise * moved / (self._spread + 0.01 * doing**2 + 1e-3)
        cached, crossed = self._measured
        self.steepness = _moved(self.steepness, step[0], 1.0)
        self.cached = _moved(self.cached, step[1], cached)
        self.crossed = _moved(self.crossed, step[2], crossed)

    def learn_outside(self, milliseconds: float) -> None:
        """So long passed between two steps; a pause in which nothing was asked does not count."""
        if milliseconds < 4.0 * self.outside + 1.0:
            self.outside += 0.05 * (milliseconds - self.outside)

    def learn_drafting(self, part: str, rows: float, milliseconds: float) -> None:
        """`augment`, `first`, `level` or `asking` took this long."""
        curve: Curve = getattr(self, part)
        expected = curve.at(rows)
        curve.learn(rows, min(milliseconds / self.speed, 2.0 * expected) - expected, DRAFTING)

    def to_json(self) -> dict[str, Any]:
        """For `from_json`."""
        curves = {name: getattr(self, name).points() for name in _CURVES}
        return {"curves": curves, "cached": self.cached, "crossed": self.crossed, "outside": self.outside}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Costs:
        """
        Raises:
            KeyError, TypeError, ValueError: damaged.
        """
        forward, logits, augment, first, level = (
            Curve({float(r): float(v) for r, v in saved["curves"][name].items()}) for name in _CURVES
        )
        made = cls(
            forward,
            logits,
            augment,
            first,
            level,
            cached=float(saved["cached"]),
            crossed=float(saved["crossed"]),
            outside=float(saved["outside"]),
        )
        if not np.isfinite(made.of_nodes(StepSize(1, 1, 1, 1.0), 4096, 1.0)).all():
            raise ValueError("a cost is not a number")
        return made


def _moved(value: float, step: float, measured: float) -> float:
    """A cost after one step of learning, a hundredth of it at most, and not too far from what was measured."""
    bound = 0.01 * value
    return min(max(value + min(max(step, -bound), bound), measured / FURTHEST), measured * FURTHEST)


_CURVES: Sequence[str] = ("forward", "logits", "augment", "first", "level")
