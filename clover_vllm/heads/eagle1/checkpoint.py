"""EAGLE-1 heads on disk, in the form that vLLM's `eagle` method loads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig

from clover_vllm.heads.clover2.init import config_for_target
from clover_vllm.heads.eagle1.model import Eagle1DraftModel
from clover_vllm.heads.weights import check_tensors, read_config, read_tensors, write_checkpoint


def save_eagle1(head: Eagle1DraftModel, folder: str | Path, target: str | Path) -> None:
    """Write the folder that vLLM's `eagle` method loads.

    Its config is a Llama's of one layer in the target's sizes, whatever the target; its weights are
    `fc.weight` and `layers.0.*` (vLLM's `EagleLlamaForCausalLM` takes embeddings and lm_head from
    the target).
    """
    config, text = head.config, AutoConfig.from_pretrained(target).get_text_config()
    llama = LlamaConfig(
        **{name: getattr(config, name) for name in _SHARED_SIZES},
        num_hidden_layers=1,
        architectures=["LlamaForCausalLM"],
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=torch.bfloat16,
    )
    tensors = {n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in head.state_dict().items()}
    write_checkpoint(tensors, llama.to_json_string(use_diff=False), Path(folder))


_SHARED_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "attention_bias",
)


def load_eagle1(folder: str | Path, dtype: torch.dtype = torch.float32) -> Eagle1DraftModel:
    """Read a folder that `save_eagle1` or `convert` wrote.

    Raises:
        UserError: anything missing, damaged, misshapen or not finite.
    """
    folder = Path(folder)
    fields = read_config(folder)
    tensors = read_tensors(folder)
    head = Eagle1DraftModel(config_for_target(LlamaConfig.from_dict(fields)), "fc.bias" in tensors)
    check_tensors(tensors, head.state_dict(), str(folder))
    head.load_state_dict({n: t.to(dtype) for n, t in tensors.items()}, assign=True)
    return head
