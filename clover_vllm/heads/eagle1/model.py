"""EAGLE-1 (arXiv 2401.15077): the baseline that the Clover-2 paper compares with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig

from clover_vllm.heads.checkpoint import check_tensors, read_config, read_tensors, write_checkpoint
from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.clover2.init import config_for_target
from clover_vllm.heads.clover2.model import DecoderLayer, KVCache, Rotary


class Eagle1DraftModel(nn.Module):
    """[embedding; feature] -> fc -> one decoder layer -> the next feature.

    A feature is the target's hidden state *after* its final norm, and lm_head reads the head's
    output directly, as vLLM's `EagleLlamaForCausalLM` does. The layer has no input norm.
    """

    def __init__(self, config: Clover2Config) -> None:
        """`config` lends its sizes; its Clover-2 constants are not used.

        The layer is a plain Llama's, as vLLM's, so it never norms queries and keys.
        """
        super().__init__()
        config = copy.copy(config)
        config.qk_norm = False
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([DecoderLayer(config, input_norm=False)])
        self.rotary = Rotary(config)

    def new_cache(self) -> list[KVCache]:
        """An empty key/value cache for the one layer."""
        return [KVCache()]

    def forward(
        self, features: torch.Tensor, embeds: torch.Tensor, cache: Sequence[KVCache] | None = None
    ) -> torch.Tensor:
        """Features one position on.

        Args:
            features: [B, T, D], post-norm hidden states at t.
            embeds: [B, T, D], embeddings of the tokens at t + 1.
            cache: when the positions continue an earlier call; grown in place.

        Returns:
            [B, T, D], predicted post-norm hidden states at t + 1.
        """
        past = cache[0].length if cache else 0
        positions = torch.arange(past, past + features.shape[1], device=features.device)[None]
        cos, sin = self.rotary(positions)
        x = self.fc(torch.cat([embeds, features], dim=-1))
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache[index] if cache else None)
        return x


@torch.no_grad()
def init_eagle1(head: Eagle1DraftModel, seed: int = 0) -> None:
    """Random first weights, as published: nothing is copied from the target."""
    generator = torch.Generator().manual_seed(seed)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            noise = torch.rand(module.weight.shape, generator=generator)
            module.weight.copy_((2 * noise - 1) * bound)
            if module.bias is not None:
                module.bias.zero_()


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
    """Read a folder that `save_eagle1` wrote.

    Raises:
        UserError: anything missing, damaged, misshapen or not finite.
    """
    folder = Path(folder)
    fields = read_config(folder)
    tensors = read_tensors(folder)
    head = Eagle1DraftModel(config_for_target(LlamaConfig.from_dict(fields)))
    check_tensors(tensors, head.state_dict(), str(folder))
    head.load_state_dict({n: t.to(dtype) for n, t in tensors.items()}, assign=True)
    return head
