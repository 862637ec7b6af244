"""Draft trees on the device, by request slot, and how they lie in a step.

Legend: S request slots, N nodes of the largest tree, R requests of the batch, L rows that are sampled: of a request
that verifies its root and nodes, of another its last row.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.states import RequestState

from clover_vllm.attention.triton.inputs import CAUSAL
from clover_vllm.attention.triton.slots import KeptTrees, lay_out_trees, put_trees
from clover_vllm.engine.backends.gpu import StepRows
from clover_vllm.tree import TreeBatch
from clover_vllm.tree.batch import PADDING

MOST_ENDINGS = 128
"""Tokens by which a request may end; with more, nothing is accepted for it. vLLM allows as many with `min_tokens`."""

NO_SLOT = -1
"""Slot of a request that is none: what fills a batch up to the size of a CUDA graph."""


class SlotTrees:
    """The tree that each request is to verify next; vLLM's `RequestState.draft_tokens` beside it holds the tokens.

    A node that would end its request, by its token or as the last one allowed, is never accepted: the target emits that
    token itself, as the step's last. So nothing behind the end is ever computed, on which sessions rely that go on
    (`Scheduler._handle_stopped_request`).

    Attributes:
        kept: the trees.
    """

    def __init__(self, requests: RequestState) -> None:
        """
        Args:
            requests: vLLM's, with S slots and N drafts each.
        """
        slots, device = requests.max_num_reqs, requests.device
        self.kept = KeptTrees.make(slots, requests.num_speculative_steps, device)
        self._requests = requests
        # See `put_trees`.
        self._rules = torch.zeros((slots, 3 + MOST_ENDINGS), dtype=torch.int64, device=device)
        self._changed: set[int] = (
            set()
        )  # slots whose new request has its logits changed by a user's processor

    def follow(self, processor: LogitsProcessor) -> None:
        """Verify chains alone for requests whose logits a processor of the user's changes; it is told of requests first.

        vLLM lets it read the drafts before a row as the row's history (`LogitsContext`), which is right in a chain alone.
        """
        original = processor.add_request

        def add_request(slot: int, params: SamplingParams) -> bool:
            changes = original(slot, params)
            if changes:
                self._changed.add(slot)
            return changes

        processor.add_request = add_request  # type: ignore[method-assign]

    def add_request(self, slot: int, params: SamplingParams | None) -> None:
        """A request that begins in a slot; it verifies chains alone if its sampling may look at what is before a row."""
        endings = sorted(params.all_stop_token_ids) if params is not None else []
        fits = len(endings) <= MOST_ENDINGS
        row = np.zeros(3 + MOST_ENDINGS, dtype=np.int64)
        if fits:
            row[0] = self._requests.max_seq_len[slot]
            row[2] = len(endings)
            row[3 : 3 + len(endings)] = endings
        row[1] = slot in self._changed or (params is not None and needs_history(params))
        self._changed.discard(slot)
        async_tensor_h2d(row, out=self._rules[slot])

    def put(self, slots: torch.Tensor, trees: TreeBatch, drafts: torch.Tensor) -> None:
        """Remember trees until they are verified.

        Args:
            slots: int64 [R], or NO_SLOT.
            trees: of these requests, of at most N nodes.
            drafts: int64 [R, N], takes tokens that can be read as a step's inputs.
        """
        total_lens = self._requests.total_len.gpu
        put_trees(
            self.kept, slots, trees.tokens, trees.parents, trees.log_probs, total_lens, self._rules, drafts
        )

    def lay_out(self, batch: InputBatch, prefill_lens: torch.Tensor, step: StepRows | None) -> None:
        """Prepare a step that verifies drafts: positions, and who sees whom.

        Drafts of a request whose root is a token of the prompt are vLLM's placeholders
        (`Scheduler.schedule`, "pad new decode requests"): they are never accepted.

        Args:
            batch: as vLLM has prepared it; positions are changed in place.
            prefill_lens: int32 [S], tokens that each request began with.
            step: takes the bits; None where trees are chains and vLLM's own attention verifies them.
        """
        if step is not None:
            step.bits.fill_(CAUSAL)
        lay_out_trees(
            self.kept,
            batch.idx_mapping,
            batch.query_start_loc,
            batch.cu_num_logits,
            prefill_lens,
            batch.positions,
            step.bits if step is not None else None,
        )

    def drop(self, rows: torch.Tensor, batch: InputBatch) -> None:
        """Never accept the nodes of these rows.

        Args:
            rows: bool [L].
            batch: of the step.
        """
        gone = torch.zeros_like(self.kept.bits, dtype=torch.bool)
        gone[batch.expanded_idx_mapping, batch.expanded_local_pos.long()] = rows
        self.kept.tokens.masked_fill_(gone[:, 1:], PADDING)


def needs_history(params: SamplingParams) -> bool:
    """Whether the sampling of a row depends on the tokens before it.

    vLLM's V2 kernels take earlier rows of a request for its history, which is right in a chain alone.
    """
    return (
        params.structured_outputs is not None
        or bool(params.bad_words)
        or params.thinking_token_budget is not None
        or params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )
