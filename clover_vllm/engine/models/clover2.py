"""The Clover-2 head as a vLLM model: the same mathematics as `head.model`, on vLLM's layers.

The augmenting layers use vLLM's `Attention`, so their keys and values are pages of the same cache as
the target's. Linear layers are vLLM's parallel ones. The lm_head is the target's, by reference, and so
are the embeddings, which for Clover-2 are lm_head rows.

Legend: N rows of any requests, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

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
    tensor_model_parallel_all_reduce,
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
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.model_executor.models.utils import get_draft_quant_config, maybe_prefix
from vllm.platforms import current_platform

from clover_vllm.base.errors import UserError
from clover_vllm.engine.models.int8 import Int8Linear, int8_linears, is_int8_quicker
from clover_vllm.engine.options import CloverOptions
from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.layers import RMSNorm as ReferenceRMSNorm
from clover_vllm.heads.weights import PROBED_ROWS, check_probe, is_finite, probe_lm_head

# Checkpoint name of a weight -> the fused parameter that holds it, and its share of that.
_FUSED: dict[str, tuple[str, str | int]] = {
    ".q_proj.": (".qkv_proj.", "q"),
    ".k_proj.": (".qkv_proj.", "k"),
    ".v_proj.": (".qkv_proj.", "v"),
    ".gate_proj.": (".gate_up_proj.", 0),
    ".up_proj.": (".gate_up_proj.", 1),
    ".k.": (".kv.", 0),
    ".v.": (".kv.", 1),
}


class RMSNorm(ReferenceRMSNorm):
    """The reference's norm: for the compiler as it is, else as vLLM's kernel where that is the quicker.

    On a CPU and for a handful of rows vLLM's own layer takes longer than both.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            return super().forward(x)
        out = torch.empty_like(x)
        ops.rms_norm(out, x.contiguous(), self.weight, self.eps)
        return out


class ResAttentionBlock(nn.Module):
    """`head.model.ResAttentionBlock`, heads split over tensor-parallel ranks."""

    def __init__(self, config: Clover2Config, quant: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        size = config.hidden_size
        ranks = get_tensor_model_parallel_world_size()
        self.ranks = ranks
        self.num_heads = config.num_attention_heads // ranks
        self.eps = config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps=config.rms_norm_eps)
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
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
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
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = AugmentingAttention(config, cache, quant, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = AugmentingMLP(config, quant, f"{prefix}.mlp")

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(positions, self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden": 0, "embeds": 0})
class AugmentingBlock(nn.Module):
    """The augmenting block (paper, section 3): mix in the token, then causal layers, then a norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        config = vllm_config.speculative_config.draft_model_config.hf_config
        quant = get_draft_quant_config(vllm_config)
        self.hidden_scale = config.hidden_scale
        self.embed_scale = config.embed_scale
        first = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
        self.clover_head_mlp_rnn = ResAttentionBlock(
            config, quant, maybe_prefix(prefix, "clover_head_mlp_rnn")
        )
        # vLLM reads a layer's number from its name; the target's layers have the lower numbers.
        self.layers = nn.ModuleList(
            AugmentingLayer(
                config, vllm_config.cache_config, quant, maybe_prefix(prefix, f"layers.{first + i}")
            )
            for i in range(config.num_hidden_layers)
        )
        self.clover_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        x = self.clover_head_mlp_rnn(hidden * self.hidden_scale, embeds * self.embed_scale)
        for layer in self.layers:
            x = layer(positions, x)
        return self.clover_norm(x)


class RowSlice(nn.Module):
    """Some rows of the target's lm_head, the same on every rank, in the layout of fast small GEMMs."""

    def __init__(self, weight: torch.Tensor, int8: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        self.cpu_linear: Any = F.linear
        if int8:
            self.cpu_linear = Int8Linear(weight)
            self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        elif current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.cpu_linear(x, self.weight, None)
        return logits


class SharedLmHead(nn.Module):
    """The target's lm_head, by reference, as the head reads it: rows as embeddings, logits, best tokens."""

    def __init__(self, config: Clover2Config) -> None:
        super().__init__()
        vocab = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("draft_vocab", vocab, persistent=False)
        self.draft_vocab: torch.Tensor | None
        # The target's; plain attributes, so that they do not count as the head's own weights.
        self._lm_head: VocabParallelEmbedding | None = None
        self._draft_head: RowSlice | None = None
        self._logits_processor = LogitsProcessor(config.vocab_size)

    def bind(self, lm_head: VocabParallelEmbedding, int8: bool = False) -> None:
        """Read this lm_head from now on, and slice its draft-vocabulary rows, in int8 if that is wanted."""
        object.__setattr__(self, "_lm_head", lm_head)
        if self.draft_vocab is not None:
            object.__setattr__(self, "_draft_head", RowSlice(self.embed(self.draft_vocab), int8))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unscaled lm_head rows of token ids [N], [N, D], whichever ranks hold them."""
        lm_head = self._lm_head
        assert lm_head is not None, "bind first"
        if lm_head.tp_size == 1:
            return F.embedding(tokens, lm_head.weight)
        first = lm_head.shard_indices.org_vocab_start_index
        here = (tokens >= first) & (tokens < lm_head.shard_indices.org_vocab_end_index)
        rows = F.embedding(torch.where(here, tokens - first, 0), lm_head.weight)
        return tensor_model_parallel_all_reduce(rows * here[:, None])

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits over the draft vocabulary, [N, draft V], of states [N, D]."""
        if self._draft_head is not None:
            return self._draft_head(states)
        assert self._lm_head is not None, "bind first"
        return self._logits_processor(self._lm_head, states)

    def candidates(self, states: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Best tokens: float32 [N, K] log-probabilities, falling, and int64 [N, K] token ids."""
        log_probs = torch.log_softmax(self.compute_logits(states), dim=-1, dtype=torch.float32)
        best, index = log_probs.topk(min(num_candidates, log_probs.shape[-1]), dim=-1)
        return best, index if self.draft_vocab is None else self.draft_vocab[index]


@support_torch_compile(dynamic_arg_dims={"states": 0, "tokens": 0})
class NextStep(nn.Module):
    """One step of the recurrence: `head.model.Clover2DraftModel.advance`, then the best candidates."""

    def __init__(
        self,
        lm_head: SharedLmHead,
        rnn: ResAttentionBlock,
        mlp: nn.Module,
        norm: nn.Module,
        embed_scale: float,
        num_candidates: int,
    ) -> None:
        super().__init__()
        self.lm_head, self.rnn, self.mlp, self.norm = lm_head, rnn, mlp, norm
        self.embed_scale = embed_scale
        self.num_candidates = num_candidates

    def forward(
        self, states: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States [N, D] and tokens [N] -> next states [N, D], then as `SharedLmHead.candidates`."""
        embeds = self.lm_head.embed(tokens) * self.embed_scale
        states = self.rnn(states, embeds)
        outputs = self.norm(self.mlp(torch.cat([states, embeds], dim=-1)))
        return states, *self.lm_head.candidates(outputs, self.num_candidates)


class Clover2DraftModel(nn.Module):
    """The head; `bind_target` must be called before it drafts.

    Raises:
        UserError: the checkpoint lacks weights, or does not fit the ranks or the target.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        self.config: Clover2Config = vllm_config.speculative_config.draft_model_config.hf_config
        config, size = self.config, self.config.hidden_size
        ranks = get_tensor_model_parallel_world_size()
        if config.num_attention_heads % ranks:
            raise UserError(
                f"The Clover-2 head has {config.num_attention_heads} attention heads, which "
                f"{ranks} tensor-parallel ranks cannot share equally."
            )
        quant = get_draft_quant_config(vllm_config)
        self.model = AugmentingBlock(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.clover_head_mlp_rnn2 = ResAttentionBlock(
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
        self.clover_head_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.shared = SharedLmHead(config)
        options: CloverOptions = vllm_config.speculative_config.clover
        k = options.candidates(vllm_config.speculative_config.num_speculative_tokens)
        self._max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self._num_candidates = k
        self._in_int8 = is_int8_quicker(options.head_precision, vllm_config.model_config.dtype)
        self._int8: dict[nn.Module, Int8Linear] = {}
        with set_model_tag("clover2_next"):  # a tag of its own, for vLLM's compile cache
            self._next = NextStep(
                lm_head=self.shared,
                rnn=self.clover_head_mlp_rnn2,
                mlp=self.clover_head_mlp2,
                norm=self.clover_head_norm,
                embed_scale=config.embed_scale,
                num_candidates=k,
            )

    def bind_target(self, target: nn.Module) -> None:
        """Share the target's lm_head, and slice its draft-vocabulary rows once.

        Raises:
            UserError: the lm_head has no plain weight (it is quantised), not the head's size, or is
                another model's.
        """
        language_model = cast(Any, target).get_language_model() if supports_multimodal(target) else target
        lm_head = getattr(language_model, "lm_head", None)
        if not isinstance(lm_head, VocabParallelEmbedding):
            raise UserError(f"Clover-2 needs the target's lm_head, which {type(target).__name__} lacks.")
        weight = getattr(lm_head, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise UserError("Clover-2 needs an lm_head that is not quantised; serve the target with one.")
        if weight.shape[1] != self.config.hidden_size or lm_head.org_vocab_size < self.config.vocab_size:
            raise UserError(
                f"The Clover-2 head was trained for an lm_head of {self.config.vocab_size} x "
                f"{self.config.hidden_size}; the target's is {lm_head.org_vocab_size} x {weight.shape[1]}."
            )
        self.shared.bind(lm_head, self._in_int8)
        for layer, linear in self._int8.items():
            object.__setattr__(layer, "cpu_linear", linear)
        self._int8 = {}
        probed = torch.linspace(0, self.config.vocab_size - 1, PROBED_ROWS).long()
        check_probe(self.config, probe_lm_head(self.embed(probed.to(weight.device)).cpu()))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `SharedLmHead.embed`."""
        return self.shared.embed(tokens)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Augmenting outputs of new positions, whose keys and values are written to the cache.

        Args:
            positions: int64 [N].
            hidden: [N, D], the target's pre-norm hidden states h_t.
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
        return self.shared.candidates(states, self._num_candidates)

    def expand(
        self, states: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step states [N, D] on by tokens [N].

        Returns:
            the next states, and the best tokens behind them as `first` does.
        """
        step = self._next if len(tokens) <= self._max_rows else self._next.forward  # compiled for no more
        return step(states, tokens)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As `SharedLmHead.compute_logits`; vLLM asks draft models for it."""
        return self.shared.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint with the published names (`head.checkpoint`).

        Raises:
            UserError: a weight is missing, unknown or not finite.
        """
        parameters = dict(self.named_parameters())
        known = set(self._checkpoint_names(parameters))
        if self.shared.draft_vocab is not None:
            known.add("draft_vocab")
        wanted = set(known)
        loaded: set[str] = set()
        for name, tensor in weights:
            if name not in known:
                raise UserError(
                    f"The Clover-2 checkpoint holds {name}, which its configuration has no place for."
                )
            wanted.discard(name)
            if name == "draft_vocab":
                assert self.shared.draft_vocab is not None
                if tensor.shape != self.shared.draft_vocab.shape or not _are_tokens(
                    tensor, self.config.vocab_size
                ):
                    raise UserError(
                        f"The Clover-2 checkpoint's draft_vocab must be {len(self.shared.draft_vocab)} token ids below "
                        f"{self.config.vocab_size}."
                    )
                self.shared.draft_vocab.copy_(tensor)
                continue
            if not is_finite(tensor):
                raise UserError(f"The Clover-2 checkpoint's weight {name} is not finite.")
            own = name if name.startswith("clover_head") and "mlp_rnn." not in name else f"model.{name}"
            share: str | int | None = None
            for part, (fused, index) in _FUSED.items():
                if part in own:
                    own, share = own.replace(part, fused), index
                    break
            parameter = parameters[own]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            if share is None:
                loader(parameter, tensor)
            else:
                loader(parameter, tensor, share)
            loaded.add(own)
        if wanted:
            raise UserError(f"The Clover-2 checkpoint lacks {len(wanted)} weights, {min(wanted)} for one.")
        if self._in_int8:
            self._int8 = int8_linears(self)
        return loaded

    @staticmethod
    def _checkpoint_names(parameters: Iterable[str]) -> Iterator[str]:
        for name in parameters:
            plain = name.removeprefix("model.")
            parts = [part for part, (fused, _) in _FUSED.items() if fused in plain]
            for part in parts:
                yield plain.replace(_FUSED[part][0], part)
            if not parts:
                yield plain


def _are_tokens(tensor: torch.Tensor, vocab_size: int) -> bool:
    return not tensor.is_floating_point() and bool(((tensor >= 0) & (tensor < vocab_size)).all())
