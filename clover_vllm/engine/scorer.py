"""Verification: the target's own sampling step along each tree's path."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
    MoveDirectionality,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from clover_vllm.base.tensors import tensor_of
from clover_vllm.tree import ROOT, Tree, walk
from clover_vllm.tree.step import NEVER, CurrentStep, Step

T = TypeVar("T")

GREEDY_ROWS = 128
"""Rows whose logits are held in float32 at a time."""

GREEDY_TEMPERATURE = 1e-5
"""Below it vLLM takes the most likely token (`vllm.v1.sample.sampler._SAMPLING_EPS`)."""


class TreeScorer(nn.Module):
    """Stands where vLLM has its `RejectionSampler`, with the same call.

    Drafts are deterministic candidates, so no rejection sampling is needed: the target samples at
    the root, and where a child carries that token it samples there, until none does. Every row is
    thus an ordinary step of vLLM's `Sampler`, with the accepted path as the request's history and one
    draw of its generator per output token. A path ends where the request does, so that nothing counts as
    computed that is not text (a streaming session goes on from there). So greedy and seeded requests get the
    tokens of plain decoding, and others its distribution, whatever vLLM's sampling parameters.

    Requests that just take the argmax of the target's logits are scored in one pass over all of their rows.
    The others are sampled depth by depth, only they, and only while their path goes on. The exception are
    logits processors of a user's own that are not vLLM's per-request adapter: nobody can tell which rows they
    change, so they see the whole batch at every depth, as in a plain step, with `update_state(None)` in
    between, and if they may change an argmax, nothing is scored in one pass. Rows of requests whose path has
    ended are in that batch too, and what comes of them is dropped. So a row's result may depend on the
    request's parameters, prompt and output so far, but a processor that counts its calls counts too many.
    """

    def __init__(self, sampler: Sampler, current: CurrentStep) -> None:
        super().__init__()
        self.sampler = sampler
        self._current = current

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """As `RejectionSampler.forward`.

        Args:
            metadata: vLLM's; the rows of `logits` are, request by request, the root and its nodes.
            draft_probs: unused, drafts are deterministic.
            logits: [rows, V].
            sampling_metadata: of the batch.

        Returns:
            tokens int32 [R, longest accepted path + 1], padded with -1, and logprobs of as many rows if any
            request wants them.
        """
        del draft_probs
        step = self._current.value if self._current.running else _warm_up_step(metadata)
        emitted, logprobs = self._score(logits, step, sampling_metadata)
        width = max(map(len, emitted))
        padded = [row + [PLACEHOLDER_TOKEN_ID] * (width - len(row)) for row in emitted]
        tokens = tensor_of(padded, logits.device, np.int32)
        return SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=_by_request(logprobs, width) if logprobs else None,
        )

    def _score(
        self, logits: torch.Tensor, step: Step, sampling_metadata: SamplingMetadata
    ) -> tuple[list[list[int]], list[LogprobsTensors]]:
        """Tokens by request, and logprobs by depth; fills `step.accepted`."""
        requests = range(len(step.trees))
        greedy = plain_greedy(sampling_metadata, step.with_logprobs, len(requests))
        fast = [r for r in requests if r in greedy]
        slow = [r for r in requests if r not in greedy and r not in step.discarded]
        output: list[list[int]] = [[0] for _ in requests]  # of discarded requests, vLLM drops it
        accepted: list[list[int]] = [[] for _ in requests]
        logprobs: list[LogprobsTensors] = []
        if fast:
            self._greedy(logits, step, fast, output, accepted)
        if slow:
            logprobs = self._sample(logits, step, slow, sampling_metadata, output, accepted)
        step.accepted = accepted
        return output, logprobs

    def _greedy(
        self,
        logits: torch.Tensor,
        step: Step,
        chosen: Sequence[int],
        output: list[list[int]],
        accepted: list[list[int]],
    ) -> None:
        """All rows of the chosen requests at once: an argmax has no side effects."""
        counts = [1 + step.nodes[r] for r in chosen]
        if len(chosen) < len(step.trees):
            rows = [step.sampled_rows[r] + i for r, n in zip(chosen, counts, strict=True) for i in range(n)]
            logits = logits[tensor_of(rows, logits.device)]
        emitted: list[int] = []
        for part in logits.split(GREEDY_ROWS):
            emitted += self.sampler.greedy_sample(part.to(torch.float32)).tolist()
        first = 0
        for r, count in zip(chosen, counts, strict=True):
            tree, own = step.trees[r], emitted[first : first + count]
            first += count
            nodes = walk(tree, own) if tree is not None else []
            output[r], accepted[r] = [own[0], *(own[node + 1] for node in nodes)], nodes
            if nodes:
                ending = step.endings.get(r, NEVER)
                last = next((i for i in range(len(nodes)) if ending.at(output[r][: i + 1])), len(nodes))
                output[r], accepted[r] = output[r][: last + 1], nodes[:last]

    def _sample(
        self,
        logits: torch.Tensor,
        step: Step,
        chosen: Sequence[int],
        sampling_metadata: SamplingMetadata,
        output: list[list[int]],
        accepted: list[list[int]],
    ) -> list[LogprobsTensors]:
        """The chosen requests, depth by depth; they drop out where their path ends. Logprobs by depth."""
        requests = len(step.trees)
        everyone: Sequence[int] = range(requests)
        processors = list(sampling_metadata.logitsprocs.all)
        may_narrow = can_narrow(sampling_metadata)
        asking = set(sampling_metadata.logprob_token_ids or ())  # the widest sets the width of the table
        current = [ROOT] * requests
        histories = step.histories or [None] * requests
        logprobs: list[LogprobsTensors] = []
        live = list(chosen)
        for r in live:
            output[r] = []
        while True:
            rows_of = sorted(asking.union(live)) if may_narrow else everyone
            rows = [step.sampled_rows[r] + current[r] + 1 for r in rows_of]
            sampled = self.sampler(
                logits[tensor_of(rows, logits.device)], narrow(sampling_metadata, rows_of, live)
            )
            if sampled.logprobs_tensors is not None:
                logprobs.append(_spread(sampled.logprobs_tensors, rows_of, requests))
            tokens = dict(zip(rows_of, sampled.sampled_token_ids[:, 0].tolist(), strict=True))
            going = []
            for r in live:
                output[r].append(tokens[r])
                node = _children(step.trees[r]).get((current[r], tokens[r]))
                if node is not None and not step.endings.get(r, NEVER).at(output[r]):
                    current[r] = node
                    accepted[r].append(node)
                    going.append(r)
            live = going
            if not live:
                break
            for r in live:  # the history of the next sampling step
                ids = histories[r]
                if ids is not None:
                    ids.append(output[r][-1])
            for processor in processors:
                processor.update_state(None)
        for r in chosen:  # vLLM's bookkeeping appends them itself
            ids = histories[r]
            if ids is not None and accepted[r]:
                del ids[-len(accepted[r]) :]
        return logprobs


def _warm_up_step(metadata: SpecDecodeMetadata) -> Step:
    """vLLM warms its sampler up outside of steps."""
    drafts = metadata.draft_token_ids.split(metadata.num_draft_tokens)
    return Step.of_trees([Tree.chain(part.tolist()) for part in drafts])


def _children(tree: Tree | None) -> dict[tuple[int, int], int]:
    return tree.children if tree is not None else {}


def plain_greedy(metadata: SamplingMetadata, with_logprobs: Iterable[int], requests: int) -> set[int]:
    """Requests that just take the argmax of the target's own logits.

    Args:
        metadata: of the batch.
        with_logprobs: requests that ask for logprobs.
        requests: in the batch.
    """
    found = set(range(requests))
    if metadata.temperature is not None:
        found = {r for r, t in enumerate(metadata.temperature.tolist()) if t < GREEDY_TEMPERATURE}
    elif not metadata.all_greedy:
        return set()
    for processor in metadata.logitsprocs.non_argmax_invariant:
        active = active_requests(processor)
        if active is None:
            return set()
        found -= active
    found -= set(with_logprobs) | set(metadata.logprob_token_ids or ()) | set(metadata.bad_words_token_ids)
    if metadata.thinking_budget_state_holder is not None:
        found.difference_update(metadata.thinking_budget_state_holder._state)
    if not metadata.no_penalties:
        penalised = metadata.frequency_penalties.ne(0) | metadata.presence_penalties.ne(0)
        penalised |= metadata.repetition_penalties.ne(1)
        found -= set(penalised.nonzero()[:, 0].tolist())
    if metadata.allowed_token_ids_mask is not None:
        found -= set(metadata.allowed_token_ids_mask.any(1).nonzero()[:, 0].tolist())
    return found


def _entries(processor: LogitsProcessor) -> str | None:
    """Name of the attribute in which a processor keeps its entries by request, or None for an unknown kind."""
    if isinstance(processor, MinTokensLogitsProcessor):
        return "min_toks"
    if isinstance(processor, LogitBiasLogitsProcessor):
        return "biases"
    kind, adapter = type(processor), AdapterLogitsProcessor
    if isinstance(processor, adapter) and (kind.apply, kind.update_state) == (
        adapter.apply,
        adapter.update_state,
    ):
        return "req_info"
    return None


def active_requests(processor: LogitsProcessor) -> set[int] | None:
    """Requests whose logits a processor changes, or None where nobody can tell."""
    if isinstance(processor, MinPLogitsProcessor):
        return set(processor.min_p_cpu.nonzero()[0].tolist()) if processor.min_p_count else set()
    name = _entries(processor)
    return None if name is None else set(getattr(processor, name))


def can_narrow(metadata: SamplingMetadata) -> bool:
    """Whether some requests of the batch can be sampled without the others."""
    return all(active_requests(processor) is not None for processor in metadata.logitsprocs.all)


def narrow_processors(processors: LogitsProcessors, chosen: Sequence[int], requests: int) -> LogitsProcessors:
    """What is left of a batch's logits processors for some of its requests, in ascending order.

    As vLLM itself condenses a batch: requests are removed, and the others move up. The originals stay as they are.
    """
    removed = sorted(set(range(requests)).difference(chosen))
    moved = [(r, i, MoveDirectionality.UNIDIRECTIONAL) for i, r in enumerate(chosen) if r != i]
    views: list[LogitsProcessor] = []
    for processor in processors.all:
        if (active_requests(processor) or set()).isdisjoint(chosen):
            continue
        view = copy.copy(processor)
        name = _entries(processor)
        if name is not None:
            setattr(view, name, dict(getattr(processor, name)))
            view.update_state(BatchUpdate(len(chosen), removed, [], moved))
        elif isinstance(view, MinPLogitsProcessor):
            view.min_p = view.min_p[torch.tensor(chosen, device=view.min_p.device)]
        views.append(view)
    return LogitsProcessors(views)


def narrow(metadata: SamplingMetadata, chosen: Sequence[int], live: Sequence[int]) -> SamplingMetadata:
    """Metadata of some requests of the batch.

    Args:
        metadata: of the whole batch.
        chosen: requests to keep, in order.
        live: those of them whose generators may be drawn from.
    """
    drawn = {r: metadata.generators[r] for r in live if r in metadata.generators}
    requests = metadata.repetition_penalties.shape[0]
    if len(chosen) == requests:
        return replace(metadata, generators=drawn, spec_token_ids=[[] for _ in chosen])
    position = {r: i for i, r in enumerate(chosen)}
    index = torch.tensor(list(chosen))

    def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[index.to(tensor.device)]

    def remap(by_request: dict[int, T]) -> dict[int, T]:
        return {position[r]: value for r, value in by_request.items() if r in position}

    budgets = copy.copy(metadata.thinking_budget_state_holder)
    if budgets is not None:  # the states of the requests stay the originals
        budgets._state = remap(budgets._state)
    return replace(
        metadata,
        temperature=rows(metadata.temperature),
        top_p=rows(metadata.top_p),
        top_k=rows(metadata.top_k),
        generators=remap(drawn),
        prompt_token_ids=rows(metadata.prompt_token_ids),
        frequency_penalties=rows(metadata.frequency_penalties),
        presence_penalties=rows(metadata.presence_penalties),
        repetition_penalties=rows(metadata.repetition_penalties),
        output_token_ids=[metadata.output_token_ids[r] for r in chosen] if metadata.output_token_ids else [],
        allowed_token_ids_mask=rows(metadata.allowed_token_ids_mask),
        bad_words_token_ids=remap(metadata.bad_words_token_ids),
        logitsprocs=narrow_processors(metadata.logitsprocs, chosen, requests),
        thinking_budget_state_holder=budgets,
        logprob_token_ids=remap(metadata.logprob_token_ids or {}) or None,
        spec_token_ids=[[] for _ in chosen],
    )


def _spread(part: LogprobsTensors, chosen: Sequence[int], requests: int) -> LogprobsTensors:
    """Rows of some requests in a table of all; the other rows are never read."""
    if len(chosen) == requests:
        return part
    index = torch.tensor(list(chosen), device=part.logprobs.device)

    def table(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_zeros(requests, *tensor.shape[1:]).index_copy_(0, index, tensor)

    return LogprobsTensors(
        table(part.logprob_token_ids), table(part.logprobs), table(part.selected_token_ranks)
    )


def _by_request(waves: list[LogprobsTensors], width: int) -> LogprobsTensors:
    """Logprobs of depth after depth as one table with `width` rows per request."""
    waves = waves + [waves[-1]] * (width - len(waves))

    def table(name: str) -> torch.Tensor:
        return torch.stack([getattr(wave, name) for wave in waves[:width]], dim=1).flatten(0, 1)

    return LogprobsTensors(table("logprob_token_ids"), table("logprobs"), table("selected_token_ranks"))
