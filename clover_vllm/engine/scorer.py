"""Verification: the target's own sampling step along each tree's path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from clover_vllm.tree import ROOT
from clover_vllm.tree.step import NEVER, RequestTree, StepTrees
from clover_vllm.tree.walk import walk_tree

T = TypeVar("T")

GREEDY_ROWS = 128
"""Rows whose logits are held in float32 at a time."""


@dataclass
class Batch:
    """What sampling needs to know of the batch beyond vLLM's metadata (filled by the runner)."""

    output_token_ids: Sequence[list[int] | None]  # per request, the lists that vLLM itself appends to
    discarded: Sequence[int]  # requests of which nothing is sampled yet: their prompt goes on


class TreeScorer(nn.Module):
    """Stands where vLLM has its `RejectionSampler`, with the same call.

    Drafts are deterministic candidates, so no rejection sampling is needed: the target samples at
    the root, and where a child carries that token it samples there, until none does. Every row is
    thus an ordinary step of vLLM's `Sampler`, with the accepted path as the request's history and one
    draw of its generator per output token. A path ends where the request does, so that nothing counts as
    computed that is not text (a streaming session goes on from there). So greedy and seeded requests get the tokens of plain
    decoding, and others its distribution, whatever vLLM's sampling parameters.

    Logits processors of a user's own are asked once per depth for the whole batch, as a plain step asks them;
    `update_state(None)` stands between. Rows of requests whose path has ended are in that batch too, and what
    comes of them is dropped. So a row's result may depend on the request's parameters, prompt and output
    so far, but a processor that counts its calls counts too many.
    """

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        self.sampler = sampler
        self.step: StepTrees | None = None
        self.batch: Batch | None = None

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
            tokens int32 [R, most drafts + 1], padded with -1, and logprobs of R * (most drafts + 1)
            rows if any request wants them.
        """
        del draft_probs
        step, batch = self.step, self.batch
        if step is None or batch is None:  # vLLM warms the sampler up
            drafts = metadata.draft_token_ids.split(metadata.num_draft_tokens)
            step = StepTrees([RequestTree.chain(part.tolist()) for part in drafts], [], [])
            batch = Batch([None] * len(drafts), [])
        if is_plain_greedy(sampling_metadata):
            emitted, logprobs = self._greedy(logits, step), None
        else:
            emitted, logprobs = self._walk(logits, step, batch, sampling_metadata)
        width = max(metadata.num_draft_tokens) + 1
        tokens = torch.tensor(
            [row + [PLACEHOLDER_TOKEN_ID] * (width - len(row)) for row in emitted], dtype=torch.int32
        ).to(logits.device)
        return SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=None if logprobs is None else _by_request(logprobs, width),
        )

    def _greedy(self, logits: torch.Tensor, step: StepTrees) -> list[list[int]]:
        """All rows at once: an argmax has no side effects."""
        emitted: list[int] = []
        for part in logits.split(GREEDY_ROWS):
            emitted += self.sampler.greedy_sample(part.to(torch.float32)).tolist()
        output, row = [], 0
        step.accepted = []
        for r, tree in enumerate(step.trees):
            if tree is None:
                step.accepted.append([])
                output.append([emitted[row]])
                row += 1
                continue
            rows = emitted[row : row + len(tree.tokens) + 1]
            accepted = walk_tree(tree.tokens, tree.parents, rows)
            tokens = [rows[0], *(rows[node + 1] for node in accepted)]
            ending = step.endings.get(r, NEVER)
            last = next((i for i in range(len(accepted)) if ending.at(tokens[: i + 1])), len(accepted))
            step.accepted.append(accepted[:last])
            output.append(tokens[: last + 1])
            row += len(rows)
        return output

    def _walk(
        self, logits: torch.Tensor, step: StepTrees, batch: Batch, sampling_metadata: SamplingMetadata
    ) -> tuple[list[list[int]], list[LogprobsTensors] | None]:
        """One sampling step of the batch per depth; requests drop out where their path ends."""
        requests = len(step.trees)
        everyone = list(range(requests))
        first_rows, row = [], 0
        for tree in step.trees:
            first_rows.append(row)
            row += 1 + (len(tree.tokens) if tree else 0)
        children = [_children(tree) for tree in step.trees]
        current = [ROOT] * requests
        step.accepted = [[] for _ in everyone]
        output: list[list[int]] = [[] for _ in everyone]
        logprobs: list[LogprobsTensors] = []
        holder = sampling_metadata.thinking_budget_state_holder
        may_narrow = all(is_idle(processor) for processor in sampling_metadata.logitsprocs.all)
        may_narrow &= holder is None or not holder.has_tracked_requests()
        may_narrow &= not sampling_metadata.logprob_token_ids  # its table is as wide as its widest request
        live = sorted(set(everyone).difference(batch.discarded))
        chosen = everyone
        while True:
            rows = torch.tensor([first_rows[r] + current[r] + 1 for r in chosen], device=logits.device)
            sampled = self.sampler(logits[rows], narrow(sampling_metadata, chosen, live))
            tokens = dict(zip(chosen, sampled.sampled_token_ids[:, 0].tolist(), strict=True))
            if sampled.logprobs_tensors is not None:
                logprobs.append(_spread(sampled.logprobs_tensors, chosen, requests))
            going = []
            for r in live:
                output[r].append(tokens[r])
                node = children[r].get((current[r], tokens[r]))
                if node is not None and not step.endings.get(r, NEVER).at(output[r]):
                    current[r] = node
                    step.accepted[r].append(node)
                    going.append(r)
            live = going
            if not live:
                break
            for r in live:  # the history of the next sampling step
                ids = batch.output_token_ids[r]
                if ids is not None:
                    ids.append(output[r][-1])
            for processor in sampling_metadata.logitsprocs.all:
                processor.update_state(None)
            chosen = live if may_narrow else everyone
        for r, nodes in enumerate(step.accepted):  # vLLM's bookkeeping appends them itself
            ids = batch.output_token_ids[r]
            if ids is not None and nodes:
                del ids[-len(nodes) :]
        for r in batch.discarded:
            output[r].append(0)  # vLLM drops it
        return output, logprobs or None


def is_plain_greedy(metadata: SamplingMetadata) -> bool:
    """Whether every request just takes the argmax of the target's own logits."""
    holder = metadata.thinking_budget_state_holder
    return (
        metadata.all_greedy
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.no_penalties
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and all(is_idle(processor) for processor in metadata.logitsprocs.non_argmax_invariant)
        and (holder is None or not holder.has_tracked_requests())
    )


def is_idle(processor: LogitsProcessor) -> bool:
    """Whether a logits processor has nothing to do for the batch; unknown ones always have."""
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    if isinstance(processor, LogitBiasLogitsProcessor):
        return not processor.biases
    if isinstance(processor, MinPLogitsProcessor):
        return not processor.min_p_count
    return False


def narrow(metadata: SamplingMetadata, chosen: list[int], live: list[int]) -> SamplingMetadata:
    """Metadata of some requests of the batch.

    Args:
        metadata: of the whole batch.
        chosen: requests to keep, in order.
        live: those of them whose generators may be drawn from.
    """
    drawn = {r: metadata.generators[r] for r in live if r in metadata.generators}
    if len(chosen) == metadata.repetition_penalties.shape[0]:
        return replace(metadata, generators=drawn, spec_token_ids=[[] for _ in chosen])
    position = {r: i for i, r in enumerate(chosen)}
    index = torch.tensor(chosen)

    def rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[index.to(tensor.device)]

    def remap(by_request: dict[int, T]) -> dict[int, T]:
        return {position[r]: value for r, value in by_request.items() if r in position}

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
        logprob_token_ids=None,  # such batches are not narrowed
        spec_token_ids=[[] for _ in chosen],
    )


def _children(tree: RequestTree | None) -> dict[tuple[int, int], int]:
    """(parent, token) -> node; the first of equal siblings."""
    found: dict[tuple[int, int], int] = {}
    if tree is not None:
        for node, key in enumerate(zip(tree.parents, tree.tokens, strict=True)):
            found.setdefault(key, node)
    return found


def _spread(part: LogprobsTensors, chosen: list[int], requests: int) -> LogprobsTensors:
    """Rows of some requests in a table of all; the other rows are never read."""
    if len(chosen) == requests:
        return part
    index = torch.tensor(chosen, device=part.logprobs.device)

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
