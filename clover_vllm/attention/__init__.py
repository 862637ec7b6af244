"""Attention over a paged prefix and a draft tree."""

from clover_vllm.attention.cpu.tree_attention import (
    TreeAttentionInputs,
    native_kernel,
    tree_attention,
    tree_attention_reference,
)

__all__ = ["TreeAttentionInputs", "native_kernel", "tree_attention", "tree_attention_reference"]
