"""Models of a real one's sizes with weights that mean nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig

from clover_vllm.bench.gpu.shapes import MODELS, Models
from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import save_head
from clover_vllm.heads.clover2.init import config_for_target


def make_models(name: str, folder: Path) -> Models:
    """Write a target's configuration, without weights, and a head.

    Args:
        name: of a shape.
        folder: where.
    """
    shape = MODELS[name]
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.wide,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
        torch_dtype=shape.dtype,
        bos_token_id=1,
        eos_token_id=2,
    )
    target, head = folder / "target", folder / "head"
    config.save_pretrained(target)
    with torch.device("meta"):
        made = Clover2DraftModel(
            config_for_target(config, draft_vocab_size=shape.draft_vocab, target="shape")
        )
    made = made.to(torch.bfloat16).to_empty(device="cpu")
    noise = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:  # repeated noise is quick to make, and as slow to multiply by
                count = weight.numel()
                weight.copy_(noise.repeat(-(-count // len(noise)))[:count].view_as(weight))
    made.draft_vocab = torch.arange(shape.draft_vocab)
    save_head(made, head)
    return Models(name, str(target), str(head))
