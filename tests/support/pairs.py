"""Random targets with untrained heads for them, and requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from engines import Json
from small import VOCAB as VOCAB
from small import head_for
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from clover_vllm.heads.clover2.checkpoint import save_head
from clover_vllm.target.frozen import FrozenTarget

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[type[PretrainedConfig], Any, bool]] = {
    "llama tied": (LlamaConfig, LlamaForCausalLM, True),
    "llama untied": (LlamaConfig, LlamaForCausalLM, False),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, False),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, True),
}


def make_pair(folder: Path, family: str) -> tuple[Path, Path]:
    """A random target and an untrained head for it."""
    torch.manual_seed(0)
    config, model, tied = FAMILIES[family]
    model(config(**SIZES, tie_word_embeddings=tied)).float().save_pretrained(folder / "target")
    save_head(head_for(FrozenTarget(folder / "target", torch.float32)), folder / "head")
    return folder / "target", folder / "head"


def llm(target: Path, **more: Any) -> Json:
    return {
        "model": str(target),
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "block_size": 32,
        "num_gpu_blocks_override": 1024,  # ample; a whole GiB takes seconds to clear
        **more,
    }


def speculative(head: Path, **options: Any) -> Json:
    """Trees of one size, whatever time things take."""
    fixed = {"tree": "best_first", "num_speculative_tokens": 8}
    return {"method": "clover2", "model": str(head), **fixed, **options}


def random_requests(count: int, **params: Any) -> list[Json]:
    """Prompts of 3 to 120 tokens, some of them twice, arriving over time."""
    generator = torch.Generator().manual_seed(1)
    requests: list[Json] = []
    for i in range(count):
        length = int(torch.randint(3, 120, (1,), generator=generator))
        prompt = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        if i % 7 == 6:
            prompt = requests[i - 5]["prompt"]
        wanted = int(torch.randint(1, 60, (1,), generator=generator))
        requests.append(
            {
                "prompt": prompt,
                "step": int(torch.randint(0, 40, (1,), generator=generator)),
                "params": {"temperature": 0.0, "max_tokens": wanted, "ignore_eos": True, **params},
            }
        )
    return requests
