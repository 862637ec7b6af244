"""The best that could have been chosen: adaptive drafting that knows the answers when it chooses nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np


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
            made.chance = _truth(made, rest)
            made._multiply()
            return trees(int((made.gain[made.order()] > 0.5).sum()))

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


def _truth(grown: Any, rest: Sequence[Sequence[int]]) -> np.ndarray:
    """1 for nodes that will be accepted, 0 for others."""
    found = np.zeros(len(grown))
    for i in range(len(grown)):
        own, above, depth = rest[grown.request[i]], int(grown.parent[i]), int(grown.depth[i])
        right_above = above < 0 or found[above] > 0.5
        found[i] = float(right_above and depth <= len(own) and own[depth - 1] == grown.token[i])
    return found
