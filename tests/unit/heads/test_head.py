"""The two forms of use of a head agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import one_sentence
from transformers import AutoConfig, AutoModelForCausalLM

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.init import config_for_target, init_from_target
from clover_vllm.target.frozen import FrozenTarget


@pytest.mark.parametrize("steps", [[1] * 9, [4, 5], [2, 1, 6], [9]])
def test_stepwise_with_cache_equals_teacher_forced(head: Clover2DraftModel, steps: list[int]) -> None:
    torch.manual_seed(1)
    hidden, embeds = torch.randn(2, 9, 64), torch.randn(2, 9, 64)
    whole = head.augment(hidden, embeds)
    cache, parts, start = head.new_cache(), [], 0
    for count in steps:
        part = slice(start, start + count)
        parts.append(head.augment(hidden[:, part], embeds[:, part], cache))
        start += count
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)
    forced = head.draft_states(whole[0, :4], [embeds[0, 1:5], embeds[0, 2:6]])
    for row in range(4):
        r = whole[0, row]
        torch.testing.assert_close(head.first(r), forced[0][row], atol=1e-5, rtol=0)
        for depth in (1, 2):
            r, s = head.advance(r, embeds[0, row + depth])
            torch.testing.assert_close(s, forced[depth][row], atol=1e-5, rtol=0)


def test_later_positions_do_not_change_earlier_ones(head: Clover2DraftModel) -> None:
    hidden, embeds = torch.randn(1, 8, 64), torch.randn(1, 8, 64)
    whole = head.augment(hidden, embeds)
    hidden[:, 5:] = 7.0
    torch.testing.assert_close(head.augment(hidden, embeds)[:, :5], whole[:, :5], atol=1e-5, rtol=0)


def test_first_weights_come_from_the_target(frozen: FrozenTarget, fitting_head: Clover2DraftModel) -> None:
    scale = fitting_head.config.hidden_scale
    source = frozen.layers[1].state_dict()
    for name, tensor in fitting_head.layers[1].state_dict().items():
        factor = scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(tensor, source[name] * factor)
    torch.testing.assert_close(fitting_head.clover_head_norm.weight, frozen.norm.weight)
    again = Clover2DraftModel(fitting_head.config)
    init_from_target(again, frozen.layers, frozen.norm)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, fitting_head.state_dict()[name])


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_heads_start_from_qwen_targets(model_type: str, tmp_path: Path) -> None:
    """The copied layer computes what the target's own does."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=211,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "target")
    target = FrozenTarget(tmp_path / "target", torch.float32)
    head = Clover2DraftModel(config_for_target(target.config))
    init_from_target(head, target.layers, target.norm)
    x = torch.randn(1, 7, 64)
    positions = torch.arange(7)[None]
    cos, sin = head.rotary(positions)
    theirs = target.layers[1](
        x, position_embeddings=(torch.cat([cos, cos], -1)[:, 0], torch.cat([sin, sin], -1)[:, 0])
    )
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    ours = head.layers[1](x, cos, sin)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    # The comparison can fail: without its norms or biases the layer computes something else.
    for name, parameter in head.layers[1].named_parameters():
        if name.endswith(("bias", "q_norm.weight")):
            parameter.data.zero_()
    assert not torch.allclose(head.layers[1](x, cos, sin), theirs, atol=1e-2)


def test_gemma_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gemma",
        vocab_size=211,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        hidden_act="silu",
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "g")
    target = FrozenTarget(tmp_path / "g", torch.float32)
    head = Clover2DraftModel(config_for_target(target.config))
    with pytest.raises(UserError, match="plain RMSNorm") as caught:
        init_from_target(head, target.layers, target.norm)
    one_sentence(caught.value)
