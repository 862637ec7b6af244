"""A new Clover head for a target: its configuration and first weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from clover_vllm.heads.clover1.config import Clover1Config
from clover_vllm.heads.clover1.model import Clover1DraftModel
from clover_vllm.heads.clover2.init import config_fields_for_new, copy_layers, copy_norm, init_block
from clover_vllm.heads.layers import ResBlock

if TYPE_CHECKING:
    from clover_vllm.heads.base import NewHead
    from clover_vllm.target.frozen import FrozenTarget


def config_for_new(target: FrozenTarget, wanted: NewHead) -> Clover1Config:
    """The target's sizes, the scales of its states, and what is wanted.

    Raises:
        UserError: the target lacks a size that the head needs, or has one it cannot use.
    """
    return Clover1Config(**config_fields_for_new(target, wanted))


@torch.no_grad()
def init_from_target(
    head: Clover1DraftModel, target_layers: Iterable[nn.Module], target_norm: nn.Module, seed: int = 0
) -> None:
    """First weights: layer and norms of the target, residual blocks that change nothing, else as Clover-2's.

    Raises:
        UserError: a target layer has another shape than the head's.
    """
    copy_layers(head.layers, target_layers, head.config.hidden_scale)
    for norm in (head.norm, head.head_norm):
        copy_norm(norm, target_norm)
    init_block(head.decoder, torch.Generator().manual_seed(seed))
    for block in head.heads:
        assert isinstance(block, ResBlock)
        nn.init.zeros_(block.linear.weight)
        nn.init.zeros_(block.linear.bias)
