"""Medusa's heads as a vLLM model: the same mathematics as `heads.medusa.model`, on vLLM's layers.

They have no cache, and no attention. All depths are computed at once, from the root's hidden state.

Legend: N rows of any requests, R roots, H heads, D hidden size, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import get_draft_quant_config, maybe_prefix

from clover_vllm.base.errors import UserError
from clover_vllm.engine.models.clover1 import ReplicatedResBlock
from clover_vllm.engine.models.head import TreeHead, language_model_of
from clover_vllm.heads.medusa.config import MedusaTreesConfig


class MedusaTreeHead(TreeHead):
    """The heads; `bind_target` must be called before they draft.

    A state is float32 [1 + 2 * H * K]: the node's depth, then scores and token ids (below 2^24, so exact) of all
    depths, which are the root's whatever tokens stand between.

    Raises:
        UserError: the checkpoint lacks weights, or does not fit the target.
    """

    config: MedusaTreesConfig
    title = "Medusa"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config)
        config, quant = self.config, get_draft_quant_config(vllm_config)
        self.heads = nn.ModuleList(
            nn.Sequential(
                *(
                    ReplicatedResBlock(config.hidden_size, quant, maybe_prefix(prefix, f"heads.{i}.{j}"))
                    for j in range(config.num_hidden_layers)
                )
            )
            for i in range(config.num_heads)
        )
        self.lm_heads: nn.Parameter | None = None
        if config.own_lm_heads:
            rows = config.draft_vocab_size or config.vocab_size
            sizes = (config.num_heads, rows, config.hidden_size)
            self.lm_heads = nn.Parameter(torch.empty(sizes), requires_grad=False)

    def bind_target(self, target: nn.Module) -> None:
        """As the base class; the target's final norm too.

        Raises:
            UserError: as the base class, or there is no such norm.
        """
        super().bind_target(target)
        norm = getattr(getattr(language_model_of(target), "model", None), "norm", None)
        if norm is None:
            raise UserError(f"Medusa needs the target's final norm, which {type(target).__name__} lacks.")
        object.__setattr__(self, "_norm", norm)  # not a weight of the head's own
        self._norm: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """The target's hidden states, normed: there is nothing to read in order."""
        del positions, embeds
        return self._norm(hidden)

    def root_states(self, rows: torch.Tensor) -> torch.Tensor:
        scores, tokens = zip(*(self._candidates(i, rows) for i in range(self.config.num_heads)), strict=True)
        table = torch.cat([*scores, *(own.float() for own in tokens)], dim=1)
        return torch.cat([table.new_zeros(len(table), 1), table], dim=1)

    def _candidates(self, depth: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Best tokens of a depth, each [R, K]."""
        states = self.heads[depth](rows)
        if self.lm_heads is None:
            return self.shared.candidates(states, self.num_candidates)
        return self.shared.best(states @ self.lm_heads[depth].T, self.num_candidates)

    def first(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = self.config.num_heads
        table = states[:, 1:].view(len(states), 2, heads, -1)
        depths = states[:, 0].long()
        rows = torch.arange(len(states), device=states.device)
        index = depths.clamp(max=heads - 1)
        scores = table[rows, 0, index].masked_fill((depths >= heads)[:, None], -torch.inf)
        return scores, table[rows, 1, index].long()

    def expand(
        self, states: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        del tokens  # what stands there changes nothing
        states = torch.cat([states[:, :1] + 1, states[:, 1:]], dim=1)
        return states, *self.first(states)
