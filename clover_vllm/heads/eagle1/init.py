"""First weights of an EAGLE-1 head."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def init_eagle1(head: nn.Module, seed: int = 0) -> None:
    """Random first weights, as published: nothing is copied from the target."""
    generator = torch.Generator().manual_seed(seed)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            noise = torch.rand(module.weight.shape, generator=generator)
            module.weight.copy_((2 * noise - 1) * bound)
            if module.bias is not None:
                module.bias.zero_()
