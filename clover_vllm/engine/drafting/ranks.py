"""Ranks of a tensor-parallel engine draft together: the first one decides, the others compute their share of it.

Each rank has times of its own, and its arithmetic may differ in a bit, so that ranks which decided for themselves might
ask the head for different levels and wait for each other for ever.
"""

from __future__ import annotations

from typing import TypeVar

from vllm.distributed import get_tp_group

from clover_vllm.tree.budget import Floats, Ints
from clover_vllm.tree.forest import LevelDrafter

T = TypeVar("T")


def leads() -> bool:
    """Whether this rank decides; true without tensor parallelism."""
    return bool(get_tp_group().is_first_rank)


def agree(value: T) -> T:
    """The first rank's value, on every rank; all of them must call."""
    group = get_tp_group()
    return value if group.world_size == 1 else group.broadcast_object(value, src=0)


class LeadingLevels:
    """`LevelDrafter` of the first rank, whose levels the others compute too; see `follow`."""

    def __init__(self, levels: LevelDrafter) -> None:
        self._levels = levels

    def first(self) -> tuple[Floats, Ints]:
        return self._levels.first()

    def expand(self, parents: Ints, tokens: Ints) -> tuple[Floats, Ints]:
        agree((parents, tokens))
        return self._levels.expand(parents, tokens)

    def end(self) -> None:
        """No level follows."""
        agree(None)


def follow(levels: LevelDrafter) -> None:
    """Compute the levels for which the first rank asks, until it asks for no more."""
    levels.first()
    while (asked := agree(None)) is not None:
        levels.expand(*asked)
