"""Optimisers: AdamW as published, and Muon for the matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

OPTIMIZERS = ("adamw", "muon")


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` for matrices, AdamW for everything else, as one optimiser.

    Muon takes matrices only, and a Trainer one optimiser only. The learning rate means the same
    for both (`match_rms_adamw`, arXiv 2502.16982).
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], **options: Any) -> None:
        """
        Args:
            matrices: two-dimensional parameters.
            others: the rest.
            options: `lr`, `weight_decay` and AdamW's `betas`.
        """
        betas = options.pop("betas")
        self._parts: list[Optimizer] = [
            Muon(matrices, adjust_lr_fn="match_rms_adamw", **options),
            AdamW(others, betas=betas, fused=True, **options),
        ]
        super().__init__([*matrices, *others], dict(options))
        self._share_groups()

    def _share_groups(self) -> None:
        # The same dictionaries, so that a learning-rate schedule reaches both parts.
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts' own states, in order."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def make_optimizer(model: nn.Module, name: str, learning_rate: float, weight_decay: float) -> Optimizer:
    """One of `OPTIMIZERS` over a model's parameters, betas (0.9, 0.95) as published."""
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay, "betas": (0.9, 0.95)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return AdamW(parameters, fused=True, **options)
    return MuonWithAdamW(
        [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2], **options
    )
