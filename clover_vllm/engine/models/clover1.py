"""The Clover head as a vLLM model: the same mathematics as `heads.clover1.model`, on vLLM's layers.

Legend: N rows of any requests, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import get_draft_quant_config, maybe_prefix

from clover_vllm.engine.models.clover2 import AugmentingLayer, KernelRMSNorm, ParallelResAttentionBlock
from clover_vllm.engine.models.head import TreeHead, check_ranks
from clover_vllm.heads.clover1.config import Clover1Config


class ReplicatedResBlock(nn.Module):
    """`heads.layers.ResBlock`, whole on every rank."""

    def __init__(self, size: int, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.linear = ReplicatedLinear(
            size, size, quant_config=quant, prefix=f"{prefix}.linear", return_bias=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.linear(x))


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden": 0, "embeds": 0})
class RootStates(nn.Module):
    """The augmenting block over the target's states, then the attention decoder over the tokens behind them."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        config = vllm_config.speculative_config.draft_model_config.hf_config
        quant = get_draft_quant_config(vllm_config)
        self.hidden_scale = config.hidden_scale
        self.embed_scale = config.embed_scale
        first = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        # vLLM reads a layer's number from its name; the target's layers have the lower numbers.
        self.layers = nn.ModuleList(
            AugmentingLayer(
                config, vllm_config.cache_config, quant, maybe_prefix(prefix, f"layers.{first + i}")
            )
            for i in range(config.num_hidden_layers)
        )
        self.norm = KernelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.decoder = ParallelResAttentionBlock(config, quant, maybe_prefix(prefix, "decoder"))

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        x = hidden * self.hidden_scale
        for layer in self.layers:
            x = layer(positions, x)
        return self.decoder(self.norm(x), embeds * self.embed_scale)


class Clover1TreeHead(TreeHead):
    """The head; `bind_target` must be called before it drafts. A state is the recurrent one and the node's depth.

    Raises:
        UserError: the checkpoint lacks weights, or does not fit the ranks or the target.
    """

    config: Clover1Config
    title = "Clover"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config)
        config, quant = self.config, get_draft_quant_config(vllm_config)
        check_ranks(config, self.title)
        self.model = RootStates(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.heads = nn.ModuleList(
            ReplicatedResBlock(config.hidden_size, quant, maybe_prefix(prefix, f"heads.{i}"))
            for i in range(config.num_heads)
        )
        self.head_norm = KernelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return self.model(positions, hidden, embeds)

    def root_states(self, rows: torch.Tensor) -> torch.Tensor:
        return F.pad(rows, (0, 1))  # depth 0

    def first(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._candidates(states[:, :-1].contiguous(), states[:, -1])

    def expand(
        self, states: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        embeds = self.embed(tokens) * self.model.embed_scale
        r = self.model.decoder(states[:, :-1].contiguous(), embeds)
        depths = states[:, -1] + 1
        return torch.cat([r, depths[:, None]], dim=1), *self._candidates(r, depths)

    def _candidates(self, r: torch.Tensor, depths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `first`, of recurrent states [N, D] at depths [N]. Waits for the device, to learn which blocks they need."""
        depths = depths.clamp(max=self.config.num_heads - 1)
        out = torch.empty_like(r)
        for depth in depths.unique().tolist():
            here = depths == depth
            out[here] = self.heads[int(depth)](r[here])
        return self.shared.candidates(self.head_norm(out), self.num_candidates)

    def own_name(self, name: str) -> str:
        return f"model.{name}" if name.startswith(("layers.", "norm.", "decoder.")) else name

    def checkpoint_name(self, name: str) -> str:
        return name.removeprefix("model.")
