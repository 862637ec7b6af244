"""Scorers that accept drafts by a wrong rule, for tests that must notice; `run_engine.py` puts them in place."""

from __future__ import annotations

import random
from typing import Any


class WrongScorer:
    """Stands where `TreeScorer` samples depth by depth.

    The rules:

    - random_child: where the walk's row has children, one of them is taken, whatever the target says.
    - second_chance: a token that no child carries is drawn once more, which favours the drafts.
    - row_before: a node's token is sampled from the logits of the row before its own.
    """

    def __init__(self, runner: Any, rule: str) -> None:
        self._scorer = runner.scorer
        self._rule = rule
        self._rng = random.Random(0)
        self._scorer._sample = self.sample

    def sample(
        self, logits: Any, step: Any, chosen: Any, metadata: Any, output: Any, accepted: Any
    ) -> list[Any]:
        """As `TreeScorer._sample`, for requests without logprobs, penalties or processors."""
        current = dict.fromkeys(chosen, -1)
        for r in chosen:
            output[r] = []
        live = list(chosen)
        while live:
            wrong = self._rule == "row_before"
            rows = [step.sampled_rows[r] + current[r] + (0 if wrong and current[r] > 0 else 1) for r in live]
            tokens, again = (self._draw(logits, rows, metadata, live) for _ in range(2))
            going = []
            for r, token, other in zip(live, tokens, again, strict=True):
                node = self._child(step.trees[r], current[r], token)
                if node is None and self._rule == "second_chance":
                    token = other
                    node = self._child(step.trees[r], current[r], token)
                if self._rule == "random_child" and step.trees[r] is not None:
                    children = [n for n, p in enumerate(step.trees[r].parents) if p == current[r]]
                    if children:
                        node = self._rng.choice(children)
                        token = step.trees[r].tokens[node]
                output[r].append(token)
                if node is not None and not step.endings[r].at(output[r]):
                    current[r] = node
                    accepted[r].append(node)
                    going.append(r)
            live = going
        return []

    def _draw(self, logits: Any, rows: list[int], metadata: Any, live: list[int]) -> list[int]:
        import torch

        from clover_vllm.engine.scorer import narrow

        sampled = self._scorer.sampler(logits[torch.tensor(rows)], narrow(metadata, live, live))
        found: list[int] = sampled.sampled_token_ids[:, 0].tolist()
        return found

    @staticmethod
    def _child(tree: Any, current: int, token: int) -> int | None:
        return None if tree is None else tree.children.get((current, token))
