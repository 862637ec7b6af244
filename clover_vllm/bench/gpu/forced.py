"""Acceptance that is forced, so that a target without sense can be timed with trees.

Everything is computed as ever: the head drafts, the target verifies, the sampler samples every row. Then the drafted
trees get a fixed form and fixed tokens, and the sampled tokens are replaced by such that a path of known length is
accepted. That takes some launches per step, which a timed step has too.
"""

from __future__ import annotations

from typing import Any

from clover_vllm.bench.gpu.shapes import ForcedMethod
from clover_vllm.tree import TreeBatch

FIRST = 3
"""Token of the first node; further nodes have the next ones."""


class Forced:
    """Forces what an engine with trees accepts."""

    def __init__(self, runner: Any, method: ForcedMethod) -> None:
        """
        Args:
            runner: a `CloverV2Runner`.
            method: of its engine.
        """
        import torch

        shape, device = method.shape, runner.device
        nodes, place = len(shape), {path: i for i, path in enumerate(shape.paths)}
        last = shape.paths[-1]  # of the deepest the least likely, so that its rows lie far apart
        path = [place[last[: depth + 1]] for depth in range(len(last))]
        assert max(method.accepted) <= len(path), "no path is as long"
        following = [-1] * (nodes + 1)  # by row: the next node of the path
        depths = [0] * (nodes + 1)
        for depth, (row, node) in enumerate(zip([0, *(node + 1 for node in path)], path, strict=False)):
            following[row], depths[row] = node, depth
        self._following = torch.tensor(following, device=device)
        self._depths = torch.tensor(depths, device=device)
        self._lengths = torch.tensor(method.accepted, device=device)
        self._parents = torch.tensor([shape.parents], device=device)
        self._tokens = torch.arange(FIRST, FIRST + nodes, device=device)[None]
        self._none = torch.zeros(
            1, nodes, device=device
        )  # log-probabilities; what they promise is not looked at
        self._never = runner.vocab_size - 1
        self._calls = 0
        self._trees = runner.trees
        self._propose, runner.speculator.propose = runner.speculator.propose, self._propose_shaped
        self._sample, runner.sampler.sample = runner.sampler.sample, self._sample_forced

    def _propose_shaped(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = self._propose(batch, *args, **kwargs)
        if kwargs.get("dummy_run"):
            return drafts
        count, slots = batch.num_reqs, batch.idx_mapping
        tokens, parents = self._tokens.expand(count, -1), self._parents.expand(count, -1)
        forced = TreeBatch(tokens.contiguous(), parents.contiguous(), self._none.expand(count, -1))
        self._trees.put(slots, forced, drafts)
        return drafts

    def _sample_forced(self, logits: Any, rows_slots: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        emitted, processed = self._sample(logits, rows_slots, *args, **kwargs)
        local = kwargs["expanded_local_pos"] if "expanded_local_pos" in kwargs else args[4]
        self._calls += 1
        slots, local = rows_slots.long(), local.long()
        node = self._following[local]
        length = self._lengths[(slots + self._calls) % len(self._lengths)]
        token = self._trees.kept.tokens[slots, node.clamp(min=0)]
        follows = (node >= 0) & (self._depths[local] < length) & (token >= 0)
        return torch.where(follows, token, self._never).to(emitted.dtype), processed
