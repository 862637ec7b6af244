"""A step: which trees it verifies and what came of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from clover_vllm.tree.draft import Tree


class Ending(NamedTuple):
    """Which token ends a request, as `vllm.v1.core.sched.utils.check_stop`. One is made per request and step."""

    tokens: frozenset[int] = frozenset()
    remaining: int = sys.maxsize  # tokens until max_tokens or max_model_len, before the step
    repeats: Callable[[Sequence[int]], bool] | None = None  # repetition detection, given the step's tokens

    def at(self, emitted: Sequence[int]) -> bool:
        """Whether the last of `emitted`, the tokens of the step so far, is the request's last."""
        return (
            len(emitted) >= self.remaining
            or emitted[-1] in self.tokens
            or (self.repeats is not None and self.repeats(emitted))
        )

    def leaves_room(self, emitted: Sequence[int]) -> bool:
        """Whether a draft can be accepted after `emitted`: the request goes on for more than one token."""
        return len(emitted) + 1 < self.remaining and not self.at(emitted)


NEVER = Ending()


@dataclass
class Step:
    """What a step verifies, in the order of the batch (made by the runner before the forward)."""

    trees: Sequence[Tree | None]  # None: no drafts for this request in this step
    rows: Sequence[int]  # rows of each request in the step
    endings: Mapping[int, Ending] = field(default_factory=dict)  # by request; none: no token ends it
    histories: Sequence[list[int] | None] = ()  # output tokens by request, the lists that vLLM appends to
    discarded: frozenset[int] = frozenset()  # requests of which nothing is sampled: their prompt goes on
    with_logprobs: frozenset[int] = frozenset()  # requests that ask for logprobs
    _accepted: list[list[int]] | None = field(default=None, init=False)

    @classmethod
    def of_trees(cls, trees: Sequence[Tree | None], **more: object) -> Step:
        """A step without prompt chunks: each request's rows are its root and its nodes."""
        return cls(trees, [1 + (len(tree) if tree else 0) for tree in trees], **more)  # type: ignore[arg-type]

    @property
    def accepted(self) -> list[list[int]]:
        """By request, the accepted nodes by depth."""
        assert self._accepted is not None, "the step has not been scored yet"
        return self._accepted

    @accepted.setter
    def accepted(self, nodes: list[list[int]]) -> None:
        assert len(nodes) == len(self.trees)
        self._accepted = nodes

    @cached_property
    def nodes(self) -> list[int]:
        """By request, nodes of its tree."""
        return [0 if tree is None else len(tree.tokens) for tree in self.trees]

    @cached_property
    def first_rows(self) -> list[int]:
        """By request, index of its first row."""
        return [end - count for end, count in zip(accumulate(self.rows), self.rows, strict=True)]

    @cached_property
    def root_rows(self) -> list[int]:
        """By request, index of its root's row. Drafts are a request's last rows, before them its prompt chunk."""
        return [end - 1 - nodes for end, nodes in zip(accumulate(self.rows), self.nodes, strict=True)]

    @cached_property
    def sampled_rows(self) -> list[int]:
        """By request, index of its root's row among the rows whose logits are computed: roots and nodes."""
        before = accumulate(self.nodes, initial=0)
        return [r + count for r, (count, _) in enumerate(zip(before, self.nodes, strict=False))]

    @cached_property
    def has_drafts(self) -> bool:
        """Whether anything is verified."""
        return any(self.nodes)

    @cached_property
    def has_branches(self) -> bool:
        """Whether any tree is more than a chain, so that the step needs masks."""
        return any(tree is not None and not tree.is_chain for tree in self.trees)

    @cached_property
    def decodes_only(self) -> bool:
        """Whether no request has more rows than its root and its drafts."""
        return self.root_rows == self.first_rows

    def moves(self) -> tuple[list[int], list[int]]:
        """Rows that accepted nodes lie in, and rows right behind their root that they belong in, where those differ.

        Sources never precede their destinations, so moving in order overwrites nothing that is still needed.
        """
        sources: list[int] = []
        destinations: list[int] = []
        for root, nodes in zip(self.root_rows, self.accepted, strict=True):
            if not nodes or nodes[-1] == len(nodes) - 1:  # ascending: the first ones
                continue
            for depth, node in enumerate(nodes):
                if node != depth:
                    sources.append(root + 1 + node)
                    destinations.append(root + 1 + depth)
        return sources, destinations


class CurrentStep:
    """The one step that is under way: the runner begins and ends it, others read it."""

    def __init__(self) -> None:
        self._step: Step | None = None

    def begin(self, step: Step) -> None:
        assert self._step is None, "the step before is still under way"
        self._step = step

    def end(self) -> None:
        self._step = None

    @property
    def running(self) -> bool:
        """False in dummy runs and while the sampler is warmed up."""
        return self._step is not None

    @property
    def value(self) -> Step:
        assert self._step is not None, "no step is under way"
        return self._step
