"""The Clover-2 head as a vLLM model: the same mathematics as `head.model`, on vLLM's layers.

The augmenting layers use vLLM's `Attention`, so their keys and values are pages of the same cache as
the target's. Linear layers are vLLM's parallel ones. The lm_head is the target's, by reference, and so
are the embeddings, which for Clover-2 are lm_head rows.

Legend: N rows of any requests, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from vllm import _custom_ops as ops
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.utils import get_draft_quant_config, maybe_prefix

from clover_vllm.engine.models.head import SharedLmHead, TreeHead, check_ranks
from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.layers import RMSNorm


class KernelRMSNorm(RMSNorm):
    """The reference's norm: for the compiler as it is, else as vLLM's kernel where that is the quicker.

    On a CPU and for a handful of rows vLLM's own layer takes longer than both.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            return super().forward(x)
        out = torch.empty_like(x)
        ops.rms_norm(out, x.contiguous(), self.weight, self.eps)
        return out


class ParallelResAttentionBlock(nn.Module):
    """`heads.clover2.model.ResAttentionBlock`, heads split over tensor-parallel ranks."""

    def __init__(self, config: Clover2Config, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        size = config.hidden_size
        ranks = get_tensor_model_parallel_world_size()
        self.ranks = ranks
        self.num_heads = config.num_attention_heads // ranks
        self.eps = config.rms_norm_eps
        self.input_layernorm = KernelRMSNorm(size, eps=config.rms_norm_eps)
        self.q = ColumnParallelLinear(size, size, quant_config=quant, prefix=f"{prefix}.q", return_bias=False)
        self.kv = MergedColumnParallelLinear(
            size, [size, size], quant_config=quant, prefix=f"{prefix}.kv", return_bias=False
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x, y: [N, D] -> [N, D]."""
        per_head = (x.shape[0], self.num_heads, -1)
        q = self.q(self.input_layernorm(x)).view(per_head)
        k, v = (part.reshape(per_head) for part in self.kv(y).chunk(2, dim=-1))
        gate = F.cosine_similarity(q.float(), k.float(), dim=-1, eps=self.eps).to(v.dtype)
        added = (gate.unsqueeze(-1) * v).flatten(1)
        if self.ranks > 1:
            added = tensor_model_parallel_all_gather(added)
        return x + added.to(x.dtype)


class AugmentingAttention(nn.Module):
    """Causal attention of an augmenting layer over the paged cache."""

    def __init__(
        self, config: Clover2Config, cache: CacheConfig, quant: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.o_proj",
            return_bias=False,
        )
        self.rotary = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self.q_norm = KernelRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = KernelRMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.attn = Attention(
            heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=cache,
            quant_config=quant,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(1)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(1)
        q, k = self.rotary(positions, q, k)
        return self.o_proj(self.attn(q, k, v))


class AugmentingMLP(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, config: Clover2Config, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        size, wide = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            size,
            [wide, wide],
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.gate_up_proj",
            return_bias=False,
        )
        self.down_proj = RowParallelLinear(
            wide, size, bias=False, quant_config=quant, prefix=f"{prefix}.down_proj", return_bias=False
        )
        self.act = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_up_proj(x)))


class AugmentingLayer(nn.Module):
    """A Llama decoder layer with its own keys and values in the paged cache."""

    def __init__(
        self, config: Clover2Config, cache: CacheConfig, quant: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.input_layernorm = KernelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = AugmentingAttention(config, cache, quant, f"{prefix}.self_attn")
        self.post_attention_layernorm = KernelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = AugmentingMLP(config, quant, f"{prefix}.mlp")

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(positions, self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LayerMixer(nn.Module):
    """`head.model.LayerMixer`."""

    def __init__(self, config: Clover2Config, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        size, count = config.hidden_size, len(config.target_layers)
        self.norms = nn.ModuleList(KernelRMSNorm(size, eps=config.rms_norm_eps) for _ in range(count))
        self.mix = ReplicatedLinear(
            count * size, size, bias=False, quant_config=quant, prefix=f"{prefix}.mix", return_bias=False
        )

    def forward(self, hidden: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """hidden: [N, (1 + layers) D], last: [N, D] -> [N, D]."""
        parts = hidden.split(last.shape[-1], dim=-1)
        known = [norm(part) for norm, part in zip(self.norms, parts[:-1], strict=True)]
        return last + self.mix(torch.cat(known, dim=-1))


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden": 0, "embeds": 0})
class AugmentingBlock(nn.Module):
    """The augmenting block (paper, section 3): mix in the token, then causal layers, then a norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        config = vllm_config.speculative_config.draft_model_config.hf_config
        quant = get_draft_quant_config(vllm_config)
        self.size = config.hidden_size
        self.clover_mixer = None
        if config.target_layers:
            self.clover_mixer = LayerMixer(config, quant, maybe_prefix(prefix, "clover_mixer"))
        self.hidden_scale = config.hidden_scale
        self.embed_scale = config.embed_scale
        first = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        self.clover_head_mlp_rnn = ParallelResAttentionBlock(
            config, quant, maybe_prefix(prefix, "clover_head_mlp_rnn")
        )
        # vLLM reads a layer's number from its name; the target's layers have the lower numbers.
        self.layers = nn.ModuleList(
            AugmentingLayer(
                config, vllm_config.cache_config, quant, maybe_prefix(prefix, f"layers.{first + i}")
            )
            for i in range(config.num_hidden_layers)
        )
        self.clover_norm = KernelRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        last = hidden[:, -self.size :] * self.hidden_scale
        if self.clover_mixer is not None:
            last = self.clover_mixer(hidden, last)
        x = self.clover_head_mlp_rnn(last, embeds * self.embed_scale)
        for layer in self.layers:
            x = layer(positions, x)
        return self.clover_norm(x)


@support_torch_compile(dynamic_arg_dims={"states": 0, "tokens": 0})
class NextStep(nn.Module):
    """One step of the recurrence: `heads.clover2.model.Clover2DraftModel.advance`, then the best candidates."""

    def __init__(
        self,
        lm_head: SharedLmHead,
        rnn: ParallelResAttentionBlock,
        mlp: nn.Module,
        norm: nn.Module,
        state_norm: nn.Module,
        embed_scale: float,
        num_candidates: int,
    ) -> None:
        super().__init__()
        self.lm_head, self.rnn, self.mlp, self.norm = lm_head, rnn, mlp, norm
        self.state_norm = state_norm
        self.embed_scale = embed_scale
        self.num_candidates = num_candidates

    def forward(
        self, states: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States [N, D] and tokens [N] -> next states [N, D], then as `SharedLmHead.candidates`."""
        embeds = self.lm_head.embed(tokens) * self.embed_scale
        states = self.state_norm(self.rnn(states, embeds))
        outputs = self.norm(self.mlp(torch.cat([states, embeds], dim=-1)))
        return states, *self.lm_head.candidates(outputs, self.num_candidates)


class Clover2TreeHead(TreeHead):
    """The head; `bind_target` must be called before it drafts.

    Raises:
        UserError: the checkpoint lacks weights, or does not fit the ranks or the target.
    """

    config: Clover2Config
    title = "Clover-2"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config)
        config, size = self.config, self.config.hidden_size
        check_ranks(config, self.title)
        quant = get_draft_quant_config(vllm_config)
        self.model = AugmentingBlock(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.clover_head_mlp_rnn2 = ParallelResAttentionBlock(
            config, quant, maybe_prefix(prefix, "clover_head_mlp_rnn2")
        )
        self.clover_head_mlp = ReplicatedLinear(
            size, size, quant_config=quant, prefix=maybe_prefix(prefix, "clover_head_mlp"), return_bias=False
        )
        self.clover_head_mlp2 = ReplicatedLinear(
            2 * size,
            size,
            quant_config=quant,
            prefix=maybe_prefix(prefix, "clover_head_mlp2"),
            return_bias=False,
        )
        self.clover_head_norm = KernelRMSNorm(size, eps=config.rms_norm_eps)
        if config.norm_state:
            self.clover_head_state_norm = KernelRMSNorm(size, eps=config.rms_norm_eps)
        with set_model_tag("clover2_next"):  # a tag of its own, for vLLM's compile cache
            self._next = NextStep(
                lm_head=self.shared,
                rnn=self.clover_head_mlp_rnn2,
                mlp=self.clover_head_mlp2,
                norm=self.clover_head_norm,
                state_norm=self.clover_head_state_norm if config.norm_state else nn.Identity(),
                embed_scale=config.embed_scale,
                num_candidates=self.num_candidates,
            )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Augmenting outputs of new positions, whose keys and values are written to the cache.

        Args:
            positions: int64 [N].
            hidden: [N, `width`], the target's pre-norm hidden states h_t, behind those of `target_layers`.
            embeds: [N, D], from `embed`, of the tokens at t + 1.

        Returns:
            g, [N, D].
        """
        return self.model(positions, hidden, embeds)

    def first(self, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Best first tokens after augmenting outputs [N, D].

        Returns:
            float32 [N, K] log-probabilities, falling, and int64 [N, K] token ids.
        """
        states = self.clover_head_norm(self.clover_head_mlp(g))  # too little work to be worth compiling
        return self.shared.candidates(states, self.num_candidates)

    def expand(
        self, states: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step states [N, D] on by tokens [N].

        Returns:
            the next states, and the best tokens behind them as `first` does.
        """
        step = self._next if len(tokens) <= self.max_rows else self._next.forward  # compiled for no more
        return step(states, tokens)

    def own_name(self, name: str) -> str:
        in_block = not name.startswith("clover_head") or "mlp_rnn." in name
        return f"model.{name}" if in_block else name

    def checkpoint_name(self, name: str) -> str:
        return name.removeprefix("model.")
