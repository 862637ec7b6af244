"""The best that could have been chosen: adaptive drafting that knows the answers when it chooses nodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def knowing(runner: Any, answers: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Choose nodes of what is drafted and retrieved as if it were known which are accepted.

    Drafting costs what it costs; only the nodes that are verified differ. What has been learnt of chances and costs
    stays as it was before. So the speed of such a run is a bound for any rule that chooses
    among the same candidates, as long as the answers are what the target says beside these trees: in float32.

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
            return trees(int((made.nodes["gain"][made.best()] > 0.5).sum()))

        made.trees = right_ones
        return made

    def ignore(*_: Any) -> None: ...

    def never(_: int) -> bool:  # a ledger may rest after a run that did not know the answers
        return False

    changed = [
        (sizer, "forest", forest),
        (sizer, "learn_outcomes", ignore),
        (sizer, "settle", ignore),
        (sizer.ledger, "forbids", never),
        (sizer.found, "forbids", never),
    ]
    for owner, name, value in changed:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, _ in changed:
            delattr(owner, name)


def _rest(runner: Any, name: str, answers: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """What a request of the runner will say; vLLM adds something random to its name."""
    known = answers.get(name, answers.get(name.rpartition("-")[0], ()))
    return known[len(runner.requests[name].output_token_ids) :]


def _tell(forest: Any, rest: Sequence[Sequence[int]]) -> None:
    """Gains become 1 for nodes that will be accepted and 0 for others."""
    nodes = forest.nodes
    gains: list[float] = []
    for request, parent, token, depth in nodes[["request", "parent", "token", "depth"]].tolist():
        known = rest[request]
        right = depth <= len(known) and known[depth - 1] == token
        gains.append(float(right) * (gains[parent] if parent >= 0 else 1.0))
    forest.regain(gains)
