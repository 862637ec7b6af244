"""Verification of draft trees on the device, in the place of vLLM's V2 rejection sampler.

Every row is sampled by plain decoding's own function, with the noise of its request's seed and its position
(`vllm.v1.worker.gpu.sample.gumbel`), so each token is what plain decoding would have emitted there; then the walk
keeps one path. Legend: L sampled rows, R requests, N nodes of the largest tree, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.metrics.logits import get_num_nans
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler, get_max_chunk_logits

from clover_vllm.attention.triton.walk import walk_trees
from clover_vllm.engine.v2.trees import SlotTrees


class DeviceScorer(RejectionSampler):
    """vLLM's sampler of every row, then the walk; requests are taken in vLLM's chunks."""

    def __init__(
        self, sampler: Sampler, spec_config: SpeculativeConfig, device: torch.device, trees: SlotTrees
    ) -> None:
        super().__init__(sampler, spec_config, device)
        self._trees = trees
        self._paths: list[torch.Tensor] = []  # by chunk
        self._slots: torch.Tensor  # int64 [L of a chunk], request slot of each row
        # Of a step: most logprobs of likely tokens, and of tokens that requests have named; None: no logprobs.
        self._widths: tuple[int, int] | None = None
        self._path: torch.Tensor | None = None  # of the step that was scored, see `ScoredSlots`

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        """As the base class.

        Args:
            logits: [L, V], of the target.
            input_batch: as the runner has prepared it, with positions of trees.
            draft_logits: not used; drafts are no samples here.
            invalid_drafts: bool [L], nodes that a grammar has not looked at.
        """
        del draft_logits
        sampler = self.sampler
        num_nans = get_num_nans(logits) if sampler.compute_nans else None
        if invalid_drafts is not None:
            self._trees.drop(invalid_drafts, input_batch)
        self._paths.clear()
        self._widths = sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        sampled, num_sampled, logprobs, masks = self._verify_in_chunks(
            logits,
            input_batch,
            None,
            input_batch.input_ids[input_batch.logits_indices],
            input_batch.positions[input_batch.logits_indices],
            get_max_chunk_logits(logits.shape[1]),
            sampler.sampling_states.max_num_logprobs(input_batch.idx_mapping_np),
        )
        self._path = torch.cat(self._paths) if len(self._paths) > 1 else self._paths[0]
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_sampled,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=logprobs,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
            sampling_mask_tensors=masks,
        )

    def take_path(self) -> torch.Tensor:
        """Which nodes the step has accepted, once; see `ScoredSlots`."""
        path, self._path = self._path, None
        assert path is not None, "no step was scored"
        return path

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One chunk of requests: their processed logits along the path, tokens, and how many of these."""
        del draft_logits, verify_draft_sampled
        emitted, processed = self.sampler.sample(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
            return_logprobs=self._widths is not None,
        )
        self._slots = expanded_idx_mapping
        sampled, num_sampled, path = walk_trees(
            emitted, cu_num_logits, idx_mapping, self._trees.kept.tokens, self._trees.kept.parents
        )
        self._paths.append(path)
        if self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES or self.sampler.return_sampling_mask:
            processed = along_path(processed, path, cu_num_logits)
        return processed, sampled, num_sampled

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        """As the base class, which takes a request's first rows for those of its tokens, and leaves out named tokens."""
        if self._widths is None:
            return None
        mode = self.sampler.logprobs_mode
        if mode not in PROCESSED_LOGPROBS_MODES:
            logits = along_path(logits, self._paths[-1], cu_num_logits)
        likely, named = self._widths
        if not named:
            return super()._get_logprobs_tensors(
                sampled, num_sampled, logits, cu_num_logits, cu_num_logits_np, max_num_logprobs
            )
        request, local = _places(len(logits), cu_num_logits)
        return compute_topk_scores(
            logits,
            likely,
            sampled[request, local].clamp(min=0),
            cu_num_logits_np.tolist(),
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=self._slots,
            max_per_req_token_ids=named,
            logits_mode=mode in ("raw_logits", "processed_logits"),
        )


def _places(rows: int, cu_num_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of the rows: its request, and which of that one's rows it is, both int64 [L]."""
    row = torch.arange(rows, dtype=torch.int32, device=cu_num_logits.device)
    request = torch.searchsorted(cu_num_logits[1:], row, right=True)
    return request, (row - cu_num_logits[request]).long()


def along_path(logits: torch.Tensor, path: torch.Tensor, cu_num_logits: torch.Tensor) -> torch.Tensor:
    """Bring the rows of each request's path to its first rows.

    Args:
        logits: [L, V].
        path: int32 [R, N], by depth, row of the accepted node within its request; 0 behind the path.
        cu_num_logits: int32 [R + 1].

    Returns:
        [L, V]; behind the path, the root's row again.
    """
    request, local = _places(len(logits), cu_num_logits)
    step = path[request, (local - 1).clamp(min=0)].where(local > 0, 0)
    return logits[cu_num_logits[request] + step]
