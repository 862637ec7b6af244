"""Drafts between the step that made them and the step that verifies them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from clover_vllm.tree import Tree


class PendingDrafts:
    """The trees whose nodes the scheduler has been given, by request.

    The scheduler knows a tree as a list of tokens. It may cut the list short, since a prefix of a tree is a
    tree, and it hands it back with the step that verifies it.
    """

    def __init__(self, count_fallback: Callable[[str], None]) -> None:
        """count_fallback: told the reason where a request gets less speculation (`metrics.REASONS`)."""
        self._trees: dict[str, Tree] = {}
        self._count_fallback = count_fallback

    def take(self, request_id: str, tokens: Sequence[int], rows: int) -> Tree:
        """What a request verifies in this step.

        Args:
            request_id: of the request.
            tokens: as the scheduler hands them back.
            rows: of the request in the step.
        """
        drafted = self._trees.get(request_id)
        count = len(tokens)
        if drafted is not None and list(drafted.tokens[:count]) == list(tokens) and rows == count + 1:
            return drafted.prefix(count)
        # Any reading of the rows is exact; a chain needs no masks. The scheduler pads some admissions with -1,
        # which no token equals.
        self._count_fallback("placeholder_draft" if tokens[0] < 0 else "unknown_draft")
        return Tree.chain(list(tokens))

    def replace(self, made: Mapping[str, Tree], stepped: Collection[str], known: Collection[str]) -> None:
        """Keep what this step has drafted.

        A running request that the step had no budget for keeps its draft, here as in the scheduler.

        Args:
            made: drafts of this step.
            stepped: requests of this step.
            known: requests that have not ended.
        """
        kept = {k: v for k, v in self._trees.items() if k in known and k not in stepped}
        self._trees = {**kept, **made}
