"""vLLM's CPU attention backend, with tree masks in steps that verify branching trees.

Registered over `AttentionBackendEnum.CPU_ATTN` by Clover's worker alone (`register_backend` is vLLM's
official way). Steps without branching trees run vLLM's code untouched.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionLayer, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from clover_vllm.attention.cpu.tree_attention import (
    LAYOUTS,
    MAX_ROWS,
    TreeAttentionInputs,
    tree_attention,
)
from clover_vllm.base.timing import StepTimer
from clover_vllm.engine.support import is_tree_cache_dtype, refuse_found, refuse_trees
from clover_vllm.tree.draft import causal_masks
from clover_vllm.tree.step import CurrentStep, Step

_causal_masks = cache(causal_masks)  # of at most MAX_ROWS numbers of rows


@dataclass
class TreeCPUAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata, and who sees whom (filled by the builder, read by every layer)."""

    tree: TreeAttentionInputs | None = None  # requests with at most MAX_ROWS rows in the step
    rest_rows: torch.Tensor | None = None  # int64, rows of the others: long prompt chunks
    rest: CPUAttentionMetadata | None = None  # vLLM's own metadata for them alone


class TreeCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds `TreeCPUAttentionMetadata` where the current step has branches."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.current = CurrentStep()  # `verification.TargetLayers` sets the runner's, for the target's layers
        self.timer = StepTimer()  # and its timer

    def check_trees(self) -> None:
        """
        Raises:
            UserError: with trees this target would not be verified correctly here.
        """
        if self.isa not in LAYOUTS:
            raise refuse_trees("the CPU attention kernel", repr(self.isa))
        if not is_tree_cache_dtype(self.kv_cache_dtype, self.dtype):
            raise refuse_trees("the KV cache type", self.kv_cache_dtype)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        plain = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not self.current.running or not self.current.value.has_branches:
            return plain
        with self.timer.measure("python"):
            return self._with_trees(self.current.value, plain, common_attn_metadata)

    def _with_trees(
        self, step: Step, plain: CPUAttentionMetadata, common_attn_metadata: CommonAttentionMetadata
    ) -> TreeCPUAttentionMetadata:
        assert len(step.rows) == common_attn_metadata.num_reqs, "trees of another step"
        made = TreeCPUAttentionMetadata(**{f.name: getattr(plain, f.name) for f in fields(plain)})
        short = [r for r, rows in enumerate(step.rows) if rows <= MAX_ROWS]
        made.tree = self._tree_inputs(step, short, plain)
        if len(short) < len(step.rows):
            long = [r for r, rows in enumerate(step.rows) if rows > MAX_ROWS]
            made.rest_rows, made.rest = self._rest(step, long, plain)
        return made

    def _tree_inputs(
        self, step: Step, requests: list[int], plain: CPUAttentionMetadata
    ) -> TreeAttentionInputs:
        values: list[int] = []
        for rows, tree in zip(step.rows, step.trees, strict=True):
            if rows > MAX_ROWS:
                values += [0] * rows
            elif tree is not None and rows == len(tree.tokens) + 1:
                values += tree.masks
            else:
                assert tree is None or tree.is_chain, "a branching tree's root is its first row"
                values += _causal_masks(rows)
        masks = torch.zeros(plain.num_actual_tokens, dtype=torch.int64)
        masks[: len(values)] = torch.from_numpy(np.array(values, dtype=np.int64))
        count = len(step.rows)
        table, lengths = plain.block_table[:count], plain.seq_lens[:count]
        starts, stops = plain.query_start_loc[:count], plain.query_start_loc[1 : count + 1]
        if len(requests) < count:
            index = torch.tensor(requests)
            table, lengths, starts, stops = (of[index] for of in (table, lengths, starts, stops))
        return TreeAttentionInputs(
            block_table=table, starts=starts, stops=stops, prefixes=lengths - (stops - starts), masks=masks
        )

    def _rest(
        self, step: Step, requests: list[int], plain: CPUAttentionMetadata
    ) -> tuple[torch.Tensor, CPUAttentionMetadata]:
        index = torch.tensor(requests)
        rows = torch.cat(
            [torch.arange(step.first_rows[r], step.first_rows[r] + step.rows[r]) for r in requests]
        )
        counts = torch.tensor([step.rows[r] for r in requests], dtype=torch.int32)
        starts = torch.zeros(len(requests) + 1, dtype=torch.int32)
        torch.cumsum(counts, 0, out=starts[1:])
        seq_lens = plain.seq_lens[index]
        scheduler_metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(requests),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=plain.causal,
            sliding_window_size=self.window_size,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return rows, CPUAttentionMetadata(
            num_actual_tokens=int(counts.sum()),
            max_query_len=int(counts.max()),
            query_start_loc=starts,
            max_seq_len=int(seq_lens.max()),
            seq_lens=seq_lens,
            block_table=plain.block_table[index],
            slot_mapping=plain.slot_mapping[rows],
            scheduler_metadata=scheduler_metadata,
            causal=plain.causal,
        )


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """Adds the tree kernel to vLLM's implementation."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not isinstance(attn_metadata, TreeCPUAttentionMetadata) or attn_metadata.tree is None:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        blocks, kv_heads, block_size, _ = kv_cache.shape
        pages = kv_cache.view(blocks, kv_heads, block_size * 2, -1)
        tree_attention(
            query,
            key,
            value,
            pages[:, :, :block_size],
            pages[:, :, block_size:],
            attn_metadata.tree,
            self.scale,
            output,
            layer.isa,  # type: ignore[attr-defined]
        )
        if attn_metadata.rest is not None and attn_metadata.rest_rows is not None:
            rows = attn_metadata.rest_rows
            attended = torch.empty_like(output[: rows.shape[0]])
            super().forward(
                layer, query[rows], key[rows], value[rows], kv_cache, attn_metadata.rest, attended
            )
            output[rows] = attended
        return output

    def check_trees(self) -> None:
        """The same as the builder's method, for what only the layer knows.

        Raises:
            UserError: the layer attends in a way that the tree kernel does not know.
        """
        refuse_found(
            {
                "ALiBi": self.alibi_slopes is not None,
                "soft-capped scores": bool(self.logits_soft_cap),
                "attention sinks": self.sinks is not None,
                "sliding-window attention": self.sliding_window != -1,
                "layers that share their KV cache": self.kv_sharing_target_layer_name is not None,
                "attention that is not a decoder's": self.attn_type != AttentionType.DECODER,
            }
        )


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """What `AttentionBackendEnum.CPU_ATTN` becomes in a Clover worker."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return TreeCPUAttentionMetadataBuilder
