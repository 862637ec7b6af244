"""The two forms of use of a head agree."""

from __future__ import annotations

import pytest
import torch

from clover_vllm.head import Clover2DraftModel
from clover_vllm.head.init import init_from_target
from clover_vllm.train.target_model import FrozenTarget


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
