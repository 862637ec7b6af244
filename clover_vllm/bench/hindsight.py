"""The best that could have been chosen: adaptive drafting that knows the answers when it chooses nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def knowing(runner: Any, answers: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Choose nodes of what is drafted and retrieved as if it were known which are accepted.

    Drafting costs what it costs, with the same requests and levels; only the nodes that are verified differ. So the
    speed of such a run is a bound for any rule that chooses among the same candidates.

    Args:
        runner: with adaptive trees.
        answers: by request, all tokens of its answer.
    """
    sizer = runner.speculation.sizer
    forest_of = sizer.forest

    def forest(wanted: Sequence[Any]) -> Any:
        made = forest_of(wanted)
        names = [runner.input_batch.req_ids[w.r] for w in wanted]
        rest = [_rest(runner, name, answers) for name in names]
        trees = made.trees

        def right_ones(count: int) -> Any:
            del count
            _tell(made, rest)
            return trees(sum(c.gain > 0.5 for c in made.best()))

        made.trees = right_ones
        return made

    sizer.forest = forest
    try:
        yield
    finally:
        del sizer.forest


def _rest(runner: Any, name: str, answers: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """What a request of the runner will say; vLLM adds something random to its name."""
    known = answers.get(name, answers.get(name.rpartition("-")[0], ()))
    return known[len(runner.requests[name].output_token_ids) :]


def _tell(forest: Any, rest: Sequence[Sequence[int]]) -> None:
    """Gains become 1 for nodes that will be accepted and 0 for others."""
    for c in forest.candidates:
        above = 1.0 if c.parent is None else c.parent.gain
        known = rest[c.request]
        c.gain = above * float(c.depth <= len(known) and known[c.depth - 1] == c.token)
