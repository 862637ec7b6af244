"""A target of Llama 3's shape: head_dim 128, llama3 rotary scaling, untied lm_head, 128,256 tokens, long contexts.

Few and narrow layers of random weights; everything that has a shape of its own in Llama 3 has it here.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engines import Json, differing, run_engine, tokens_of
from length import length
from pairs import llm, speculative
from transformers import LlamaConfig, LlamaForCausalLM

from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import save_head
from clover_vllm.heads.clover2.init import config_for_target, init_from_target
from clover_vllm.target.frozen import FrozenTarget

VOCAB = 128_256
DRAFT_VOCAB = 32_768
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random target and a head for it that drafts a part of the vocabulary."""
    folder = tmp_path_factory.mktemp("llama3")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=131_072,
        rope_parameters=ROPE,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=128_000,
        eos_token_id=128_001,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder / "target")
    frozen = FrozenTarget(folder / "target", torch.float32)
    made = config_for_target(frozen.config, target="llama3", draft_vocab_size=DRAFT_VOCAB)
    assert (made.head_dim, made.rope_parameters["rope_type"]) == (128, "llama3")
    head = Clover2DraftModel(made)
    init_from_target(head, frozen.layers, frozen.norm)
    head.draft_vocab = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
    save_head(head, folder / "head")
    return folder / "target", folder / "head"


def requests() -> list[Json]:
    """Prompts of 2,600 to 3,600 tokens, greedy and with seeds in turn; one fills max_model_len."""
    rng = random.Random(0)
    found: list[Json] = []
    for i in range(length(4, 24)):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randrange(2600, 3600))]
        seeded = {"temperature": 0.8, "top_p": 0.9, "seed": i}
        kind = seeded if i % 2 else {"temperature": 0.0}
        params = {**kind, "max_tokens": 40, "ignore_eos": True}
        found.append({"prompt": prompt, "step": 2 * i, "params": params})
    found[0]["prompt"] += [rng.randrange(VOCAB) for _ in range(4096 - 24 - len(found[0]["prompt"]))]
    return found


def test_trees_over_long_contexts_change_nothing(pair: tuple[Path, Path]) -> None:
    """Plain vLLM's answers, hidden in branching trees, are accepted and said again; so are the keys and values.

    And the head computes what the reference computes, rotary scaling and draft vocabulary included.
    """
    target, head = pair
    asked = requests()
    ample = llm(target, max_model_len=4096, max_num_seqs=4)
    plain = run_engine({**ample, "max_num_batched_tokens": 8192}, asked)
    answers = tokens_of(plain)
    assert len({token for (tokens,) in answers for token in tokens}) > 20 * len(
        asked
    )  # not one token for ever
    trees = run_engine(
        {**ample, "max_num_batched_tokens": 1024, "speculative_config": speculative(head)},
        asked,
        scripted={"answers": answers, "seed": 7},
        check_head=str(head),
        check_cache=True,
    )
    stats = trees["stats"]
    print({key: value for key, value in stats.items() if "by_request" not in key})
    assert differing(plain, trees) == 0
    assert len(answers[0][0]) == 24
    assert stats["verified"]["branching"] > 5 * len(asked)
    assert stats["accepted"] > 10 * len(asked)
    assert stats["accepted_in"]["branching"] > 3 * len(asked)
    assert stats["off_first_chain"] > 3 * len(asked)
    assert stats["leaked_blocks"] == 0
    assert stats["cache_rows"] > 2600 * len(asked)
    assert stats["cache_error"] < 1e-4
    assert set(stats["head_errors"]) == {"prefill", "chunk", "decode", "first", "expand"}
    assert max(stats["head_errors"].values()) < 2e-5, stats["head_errors"]
