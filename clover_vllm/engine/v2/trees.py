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
from vllm.v1.worker.gpu.states import RequestState

from clover_vllm.attention.triton.inputs import CAUSAL
from clover_vllm.engine.backends.gpu import StepRows
from clover_vllm.tree import ROOT, TreeBatch
from clover_vllm.tree.batch import PADDING, ancestry, likeliest_chains

MOST_ENDINGS = 128
"""Tokens by which a request may end; with more, nothing is accepted for it. vLLM allows as many with `min_tokens`."""


class SlotTrees:
    """The tree that each request is to verify next; vLLM's `RequestState.draft_tokens` beside it holds the tokens.

    A node that would end its request, by its token or as the last one allowed, is never accepted: the target emits that
    token itself, as the step's last. So nothing behind the end is ever computed, on which sessions rely that go on
    (`Scheduler._handle_stopped_request`).
    """

    def __init__(self, requests: RequestState, deepest: int) -> None:
        """
        Args:
            requests: vLLM's, with S slots and N drafts each.
            deepest: most levels of a tree.
        """
        slots, nodes, device = requests.max_num_reqs, requests.num_speculative_steps, requests.device
        self.tokens = torch.full((slots, nodes), PADDING, dtype=torch.int64, device=device)
        self.parents = torch.full((slots, nodes), ROOT, dtype=torch.int64, device=device)
        self.deepest = deepest
        self._requests = requests
        self._bits = torch.ones((slots, nodes + 1), dtype=torch.int64, device=device)  # of root and nodes
        self._depths = torch.zeros((slots, nodes + 1), dtype=torch.int64, device=device)
        self._chain = torch.arange(ROOT, nodes - 1, device=device)  # its parents
        self._takes_chains = np.zeros(slots, dtype=bool)  # on the host
        self._endings = torch.full((slots, MOST_ENDINGS), PADDING, dtype=torch.int64, device=device)
        self._limits = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens, the prompt's included

    def add_request(self, slot: int, params: SamplingParams | None) -> None:
        """A request that begins in a slot; it verifies chains alone if its sampling looks at what is before a row."""
        self._takes_chains[slot] = params is not None and needs_history(params)
        endings = sorted(params.all_stop_token_ids) if params is not None else []
        fits = len(endings) <= MOST_ENDINGS
        row = np.full(MOST_ENDINGS + 1, PADDING)
        row[: len(endings) if fits else 0] = endings if fits else []
        row[-1] = self._requests.max_seq_len[slot] if fits else 0
        on_device = async_tensor_h2d(row, device=self.tokens.device)
        self._endings[slot] = on_device[:-1]
        self._limits[slot] = on_device[-1]

    def put(self, slots: torch.Tensor, on_host: np.ndarray, trees: TreeBatch) -> torch.Tensor:
        """Remember trees until they are verified.

        Args:
            slots: int64 [R].
            on_host: the same.
            trees: of these requests.

        Returns:
            int64 [R, N], tokens that can be read as a step's inputs.
        """
        padded = trees.padded(self.tokens.shape[1])
        tokens, parents = padded.tokens, padded.parents
        chains = self._takes_chains[on_host]
        if chains.any():
            chosen = async_tensor_h2d(chains, device=tokens.device)[:, None]
            tokens = torch.where(chosen, likeliest_chains(tokens, parents, self.deepest), tokens)
            parents = torch.where(chosen, self._chain, parents)
        bits, depths = ancestry(parents)
        left = self._limits[slots] - self._requests.total_len.gpu[slots]
        ends = (tokens[:, :, None] == self._endings[slots][:, None]).any(2) | (depths >= left[:, None])
        self.tokens[slots] = tokens.masked_fill(ends, PADDING)
        self.parents[slots] = parents
        self._bits[slots, 1:] = bits
        self._depths[slots, 1:] = depths
        return tokens.clamp(min=0)

    def lay_out(self, batch: InputBatch, prefill_lens: torch.Tensor, step: StepRows | None) -> None:
        """Prepare a step that verifies drafts: positions, and who sees whom.

        Drafts of a request whose root is a token of the prompt are vLLM's placeholders
        (`Scheduler.schedule`, "pad new decode requests"): they are never accepted.

        Args:
            batch: as vLLM has prepared it; positions are changed in place.
            prefill_lens: int32 [S], tokens that each request began with.
            step: takes the bits; None where trees are chains and vLLM's own attention verifies them.
        """
        rows, local = batch.logits_indices, batch.expanded_local_pos.long()
        slots = batch.expanded_idx_mapping
        positions = batch.positions[rows] - local  # of the roots
        decodes = positions >= prefill_lens[slots]
        roots = batch.cu_num_logits[:-1].long()
        own = batch.idx_mapping
        self.tokens[own] = torch.where(decodes[roots][:, None], self.tokens[own], PADDING)
        if step is None:
            return
        step.bits.fill_(CAUSAL)
        step.bits[rows] = torch.where(decodes, self._bits[slots, local], CAUSAL)
        batch.positions[rows] = positions + torch.where(decodes, self._depths[slots, local], local)

    def drop(self, rows: torch.Tensor, batch: InputBatch) -> None:
        """Never accept the nodes of these rows.

        Args:
            rows: bool [L].
            batch: of the step.
        """
        gone = torch.zeros_like(self._bits, dtype=torch.bool)
        gone[batch.expanded_idx_mapping, batch.expanded_local_pos.long()] = rows
        self.tokens.masked_fill_(gone[:, 1:], PADDING)


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
