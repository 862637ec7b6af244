"""A random target with a tokenizer and an untrained head, for tests that need no sense but much variety."""

from __future__ import annotations

from pathlib import Path

import torch

VOCAB = 320
"""Tokens of the tiny target: bytes, three special ones and some merges."""

_TEXT = "the cat sat on the mat and thought of <think> its dinner </think> "


def make_tiny_pair(
    folder: Path, seed: int = 0, kv_heads: int = 2, window: int | None = None
) -> tuple[Path, Path]:
    """Write a two-layer Llama of random float32 weights, and a head of its sizes.

    Args:
        folder: where `target` and `head` are written.
        seed: of the weights.
        kv_heads: of the 4 heads' keys and values.
        window: tokens that each token sees; the target is a Mistral then.

    Returns:
        folders of target and head.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        PreTrainedTokenizerFast,
    )

    from clover_vllm.heads.clover2 import Clover2DraftModel
    from clover_vllm.heads.clover2.checkpoint import save_head
    from clover_vllm.heads.clover2.init import config_for_target, init_from_target
    from clover_vllm.target.frozen import FrozenTarget

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([_TEXT * 3] * 20, trainer)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    target = folder / "target"
    model = (
        LlamaForCausalLM(LlamaConfig(**sizes))
        if window is None
        else MistralForCausalLM(MistralConfig(**sizes, sliding_window=window))
    )
    model.float().save_pretrained(target)
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(target)
    frozen = FrozenTarget(target, torch.float32)
    head = Clover2DraftModel(config_for_target(frozen.config, target="tiny"))
    init_from_target(head, frozen.layers, frozen.norm)
    save_head(head, folder / "head")
    return target, folder / "head"
