"""vLLM's attention backends for GPUs, with tree masks in steps that verify drafts.

Registered over `AttentionBackendEnum.TRITON_ATTN` and `FLASH_ATTN` by Clover's workers alone. Prompt chunks and steps
without drafts run vLLM's code untouched; the rows of draft trees are attended by `clover_vllm.attention.triton`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from clover_vllm.attention.triton.inputs import CAUSAL, PagedTrees
from clover_vllm.engine.support import is_tree_cache_dtype, refuse_found, refuse_trees

if TYPE_CHECKING:
    from clover_vllm.attention.triton.tree_attention import SplitContexts

TREES = "clover_trees"
"""Attribute of vLLM's attention metadata that holds `TreeRows` in a step that verifies drafts."""


@dataclass
class StepRows:
    """Who sees whom in the step under way, for the metadata builders of the target's layers (set by the runner)."""

    bits: torch.Tensor  # int64 [most rows of a step], persistent; see `PagedTrees.bits`
    nodes: int  # most per tree
    verifies: bool = False  # whether any request verifies drafts
    decodes_only: bool = False  # whether all requests have nothing but a root and its nodes

    @classmethod
    def make(cls, rows: int, nodes: int, device: torch.device) -> StepRows:
        return cls(torch.full((rows,), CAUSAL, dtype=torch.int64, device=device), nodes)


@dataclass(frozen=True)
class TreeRows:
    """What the layers attend with the tree kernel (made by the builder)."""

    trees: PagedTrees
    alone: bool  # all rows of the step; else only those of requests with trees


class TreeMetadataBuilder:
    """Adds `TreeRows` to the metadata of vLLM's builders; a mixin."""

    step: StepRows | None = None  # set by `CloverV2Runner`, for the target's layers

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """Graphs of whole steps where all requests have the same number of rows."""
        given = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]
        return min(given, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self.step is not None and self.step.verifies:
            self._add(made, common_attn_metadata, self.step, self.step.decodes_only)
        return made

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        made = super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        if self.step is not None and common_attn_metadata.max_query_len > 1:  # else a step without drafts
            self._add(made, common_attn_metadata, self.step, True)
        return made

    @staticmethod
    def _add(made: Any, common: CommonAttentionMetadata, step: StepRows, alone: bool) -> None:
        most = min(step.nodes + 1, common.max_query_len)
        trees = PagedTrees(
            common.block_table_tensor, common.query_start_loc, common.seq_lens, step.bits, most
        )
        setattr(made, TREES, TreeRows(trees, alone))


class TreeAttentionImpl:
    """Runs the tree kernel over what vLLM's implementation leaves to it; a mixin."""

    scale: float
    num_heads: int
    kv_cache_dtype: str
    sliding_window: tuple[int, int]  # rows before and behind a row that it sees; -1: all
    contexts: SplitContexts  # set by `CloverV2Runner`

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the base class; the step's own keys and values are in the cache already."""
        rows: TreeRows | None = getattr(attn_metadata, TREES, None)
        if rows is None or not rows.alone:
            super().forward(  # type: ignore[misc]
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
        if rows is not None:
            from clover_vllm.attention.triton.tree_attention import tree_attention

            tree_attention(
                query,
                kv_cache,
                output,
                rows.trees,
                self.scale,
                window=1 + self.sliding_window[0],
                all_rows=rows.alone,
                partials=self.contexts.of(rows.trees.seq_lens.shape[0], rows.trees.max_rows),
            )
        return output

    def fused_output_quant_supported(self, quant_key: object) -> bool:
        """The tree kernel writes no quantised output."""
        del quant_key
        return False

    def check_trees(self, dtype: torch.dtype) -> None:
        """Refuse what the tree kernel does not know.

        Raises:
            UserError: the layer attends in another way.
        """
        if not is_tree_cache_dtype(self.kv_cache_dtype, dtype):
            raise refuse_trees("the KV cache type", self.kv_cache_dtype)
        refuse_found(
            {
                "ALiBi": getattr(self, "alibi_slopes", None) is not None,
                "soft-capped scores": bool(getattr(self, "logits_soft_cap", 0)),
                "attention sinks": getattr(self, "sinks", None) is not None,
                "chunked local attention": getattr(self, "chunk_lookback", -1) != -1,
                "layers that share their KV cache": getattr(self, "kv_sharing_target_layer_name", None)
                is not None,
                "attention that is not a decoder's": getattr(self, "attn_type", None)
                != AttentionType.DECODER,
            }
        )


class TreeTritonMetadataBuilder(TreeMetadataBuilder, TritonAttentionMetadataBuilder):
    """For vLLM's Triton attention."""


class TreeTritonImpl(TreeAttentionImpl, TritonAttentionImpl):
    """For vLLM's Triton attention."""


class TreeTritonBackend(TritonAttentionBackend):
    """What `AttentionBackendEnum.TRITON_ATTN` becomes in a Clover worker."""

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        return TreeTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        return TreeTritonMetadataBuilder


class TreeFlashMetadataBuilder(TreeMetadataBuilder, FlashAttentionMetadataBuilder):
    """For FlashAttention."""


class TreeFlashImpl(TreeAttentionImpl, FlashAttentionImpl):
    """For FlashAttention."""


class TreeFlashBackend(FlashAttentionBackend):
    """What `AttentionBackendEnum.FLASH_ATTN` becomes in a Clover worker."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return TreeFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return TreeFlashMetadataBuilder
