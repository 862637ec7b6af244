"""Every wrong combination of sizes is one clear sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import one_sentence
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2 import Clover2Config
from clover_vllm.heads.clover2.init import config_for_target, measure_scales
from clover_vllm.heads.layers import Rotary


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": 66}, "num_attention_heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"hidden_scale": -1.0}, "hidden_scale"),
        ({"embed_scale": float("inf")}, "embed_scale"),
        ({"draft_vocab_size": 102}, "draft_vocab_size"),
        ({"draft_vocab_size": 0}, "draft_vocab_size"),
        ({"rope_parameters": "default"}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor"),
    ],
)
def test_wrong_sizes_are_refused_in_one_sentence(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as caught:
        Clover2Config(**fields)
    one_sentence(caught.value)
    assert named in str(caught.value)


def test_config_survives_saving() -> None:
    config = Clover2Config(hidden_scale=0.03, draft_vocab_size=7, target="x", target_probe=[1.0] * 8)
    again = Clover2Config.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.architectures == ["Clover2DraftModel"]


def test_llama3_rope_equals_transformers() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    target = LlamaConfig(hidden_size=128, num_attention_heads=4, head_dim=32, rope_parameters=rope)
    positions = torch.arange(300)[None]
    cos, sin = Rotary(config_for_target(target))(positions)
    expected_cos, expected_sin = LlamaRotaryEmbedding(target)(torch.zeros(1), positions)
    torch.testing.assert_close(cos[:, 0], expected_cos[..., :16], atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[:, 0], expected_sin[..., :16], atol=1e-5, rtol=0)


def test_measured_scales_bring_inputs_to_rms_one() -> None:
    torch.manual_seed(0)
    hidden, lm_head = 28 * torch.randn(500, 64), 0.14 * torch.randn(101, 64)
    ids = torch.randint(101, (500,))
    hidden_scale, embed_scale = measure_scales(hidden, lm_head, ids)
    assert (hidden * hidden_scale).square().mean().sqrt().item() == pytest.approx(1, abs=0.02)
    assert (lm_head[ids] * embed_scale).square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)


def test_target_without_llama_sizes_is_refused() -> None:
    class Other:
        hidden_size = 64

    with pytest.raises(UserError, match="intermediate_size") as caught:
        config_for_target(Other())
    one_sentence(caught.value)
