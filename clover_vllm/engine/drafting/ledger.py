"""Whether asking the head, and looking texts up, has paid, from what steps really took and what was accepted in them.

`Sizer` forecasts what drafting gains. A forecast leaves things out: that the head has to read the prompts of requests
that come, say, or that it finds less in this text than in the last. The ledger keeps accounts of what drafting has
spent and saved, and lets it rest where it has lost, longer each time that it loses again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

TRIAL = 96
"""Steps after which drafting for a load is judged, whatever chance says."""

EARLY, SURE = 16, 2.5
"""Steps after which it is judged already if the loss is that many standard errors."""

MEMORY = 128
"""Steps that count, roughly: older ones fade."""

FIRST_REST, LONGEST_REST = 256, 8192
"""Steps without drafting after a loss: at first, and at most after doubling each time."""


TEXTS = 1024
"""Texts over which it is judged whether looking pays, roughly, each counted in every step that looks: one is full of
repetitions, the next ten have none, and a look takes a small part of what a hit saves."""

QUICKEST = 0.05
"""Weight of a step in that, at most, however many texts were looked at in it."""

RETRIEVE_EVERY = 16
"""Steps between two tries to look texts up while that does not pay."""


@dataclass
class _Account:
    """Of one load."""

    spent: float = 0.0  # milliseconds
    saved: float = 0.0
    squares: float = 0.0  # of what a step saved less what it spent
    steps: int = 0  # since the last rest
    rest: int = FIRST_REST  # after the next loss
    resting: int = 0  # steps left


@dataclass
class Ledger:
    """Accounts by load, the number of requests that can use a draft, in steps of about 1.4."""

    _accounts: dict[int, _Account] = field(default_factory=dict)

    def _of(self, requests: int) -> _Account:
        bits = requests.bit_length()
        load = 2 * bits + (requests >> max(0, bits - 2)) % 2
        if load not in self._accounts:
            # What has lost with a few requests less hardly gains now.
            smaller = self._accounts.get(load - 1, _Account())
            self._accounts[load] = _Account(resting=min(smaller.resting, FIRST_REST))
        return self._accounts[load]

    def record(self, requests: int, spent: float, saved: float) -> None:
        """A step for which the head was asked.

        Args:
            requests: that could use a draft when it was chosen.
            spent: milliseconds of drafting before it, and of verifying the head's nodes in it.
            saved: milliseconds of steps without drafts that the accepted nodes have spared.
        """
        account = self._of(requests)
        if account.resting:
            return
        account.spent += spent - account.spent / MEMORY
        account.saved += saved - account.saved / MEMORY
        account.squares += (saved - spent) ** 2 - account.squares / MEMORY
        account.steps += 1
        if account.steps < EARLY:
            return
        lost = account.spent - account.saved
        if lost > (0.0 if account.steps >= TRIAL else SURE * math.sqrt(account.squares)):
            account.resting, account.rest = account.rest, min(2 * account.rest, LONGEST_REST)
            account.spent = account.saved = account.squares = 0.0
            account.steps = 0
        elif account.steps >= 4 * TRIAL:
            account.rest = FIRST_REST

    def forbids(self, requests: int) -> bool:
        """Whether drafting for this many requests has lost lately. Counts a step."""
        account = self._of(requests)
        account.resting = max(0, account.resting - 1)
        return account.resting > 0


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

    def learn(self, saved: float, taken: float, texts: int) -> None:
        """What looking at some texts in a step saved and took, each on average. A try stands for the steps that rested."""
        weight = min(QUICKEST, texts * (RETRIEVE_EVERY if self.resting else 1) / TEXTS)
        self.saved += weight * (saved - self.saved)
        self.taken += weight * (min(taken, 4.0 * self.taken) - self.taken)
        self.resting = self.saved < self.taken * (1.5 if self.resting else 1.0)
