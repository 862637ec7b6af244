"""Configuration of a Clover-2 head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from clover_vllm.base.errors import UserError

MOST_LAYERS = 128
"""More augmenting layers, or draft heads, are a damaged config rather than a head."""


class Clover2Config(PretrainedConfig):
    """Sizes and constants of a Clover-2 head.

    The defaults describe nothing in particular; `clover_vllm.heads.clover2.init.config_for_target`
    derives a configuration from a target model.

    Args:
        hidden_size: d, the target's hidden size. The residual attention blocks split it into
            `num_attention_heads` heads of d / num_attention_heads channels.
        intermediate_size: width of the gated MLP in the augmenting layers.
        num_attention_heads: query heads of the augmenting layers, and heads of the blocks.
        num_key_value_heads: key/value heads of the augmenting layers.
        head_dim: channels per attention head in the augmenting layers.
        num_hidden_layers: number of augmenting layers (`layers.*`), 2 as published.
        num_heads: number of recurrent draft heads that the head was trained for, 5 as published.
            Heads 1 and up share weights, so drafting may go deeper than this.
        vocab_size: rows of the target's lm_head.
        draft_vocab_size: number of token ids in the checkpoint's `draft_vocab`, or None when
            drafting scores the whole vocabulary.
        rms_norm_eps: epsilon of every RMSNorm, and of the cosine similarity.
        rope_theta: base of the rotary embedding. The published code uses 10000 whatever the target.
        rope_parameters: Hugging Face rope dictionary; wins over `rope_theta` when given. Only
            `rope_type: default` and `rope_type: llama3` are supported.
        max_position_embeddings: largest position plus one that the target supports.
        attention_bias: whether q, k and v projections of the augmenting layers have a bias.
        qk_norm: whether the augmenting layers norm queries and keys per head, as Qwen3's do.
        hidden_scale: multiplies the target's hidden state before it enters the head (1.0 for
            published checkpoints).
        embed_scale: multiplies lm_head rows used as token embeddings (1.0 for published ones).
        norm_state: whether the recurrent state goes on normed, so that it does not grow with depth
            (arXiv 2605.09992).
        target_layers: further layers of the target whose input is read, besides the last one's output, increasing;
            None for none.
        target: name of the target model, for error messages and model cards.
        target_probe: what `probe_lm_head` measured on the target, or None if unknown.
        first_acceptance: share of steps whose likeliest draft token is accepted, greedy on held-out
            prompts, as measured by `clover-vllm eval`; or None. A server far below it warns.

    Raises:
        UserError: a size or a combination of sizes that cannot work.
    """

    model_type = "clover2"

    def __init__(
        self,
        hidden_size: int = 64,
        intermediate_size: int = 96,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        num_hidden_layers: int = 2,
        num_heads: int = 5,
        vocab_size: int = 101,
        draft_vocab_size: int | None = None,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_parameters: Mapping[str, Any] | None = None,
        max_position_embeddings: int = 2048,
        attention_bias: bool = False,
        qk_norm: bool = False,
        hidden_scale: float = 1.0,
        embed_scale: float = 1.0,
        norm_state: bool = False,
        target_layers: Sequence[int] | None = None,
        target: str | None = None,
        target_probe: Sequence[float] | None = None,
        first_acceptance: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim: int
        if head_dim is None and _is_count(hidden_size) and _is_count(num_attention_heads):
            head_dim = max(1, hidden_size // num_attention_heads)
        self.head_dim = head_dim  # type: ignore[assignment]  # None only where check() refuses
        self.num_hidden_layers = num_hidden_layers
        self.num_heads = num_heads
        self.vocab_size = vocab_size
        self.draft_vocab_size = draft_vocab_size
        self.rms_norm_eps = rms_norm_eps
        if rope_parameters is None:
            rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
        elif not isinstance(rope_parameters, Mapping):
            raise UserError(f"{self._name}: rope_parameters is {rope_parameters!r}; it must be a dictionary.")
        self.rope_parameters = dict(rope_parameters)
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.hidden_scale = hidden_scale
        self.embed_scale = embed_scale
        self.norm_state = norm_state
        self.target_layers = list(target_layers or [])
        self.target = target
        self.target_probe = None if target_probe is None else list(target_probe)
        self.first_acceptance = first_acceptance
        self.check()
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs.setdefault("architectures", ["Clover2DraftModel"])
        super().__init__(**kwargs)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def check(self) -> None:
        """Raise UserError, one sentence, for the first size that cannot work."""
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_hidden_layers",
            "num_heads",
            "vocab_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not _is_count(value):
                raise UserError(f"{self._name}: {name} is {value!r}; it must be a whole number of 1 or more.")
        for name in ("num_hidden_layers", "num_heads"):
            if getattr(self, name) > MOST_LAYERS:
                raise UserError(
                    f"{self._name}: {name} is {getattr(self, name)}; it must be at most {MOST_LAYERS}."
                )
        layers = self.target_layers
        if not all(isinstance(i, int) and i >= 0 for i in layers) or layers != sorted(set(layers)):
            raise UserError(
                f"{self._name}: target_layers is {layers!r}; it must be increasing layer numbers."
            )
        share = self.first_acceptance
        if share is not None and share != 0 and not (_is_positive(share) and share <= 1):
            raise UserError(
                f"{self._name}: first_acceptance is {share!r}; it must be a number from 0 to 1, or null."
            )
        for name in ("rms_norm_eps", "hidden_scale", "embed_scale"):
            value = getattr(self, name)
            if not _is_positive(value):
                raise UserError(f"{self._name}: {name} is {value!r}; it must be a positive number.")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"{self._name}: hidden_size {self.hidden_size} cannot be split into "
                f"num_attention_heads {self.num_attention_heads} heads of equal size."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"{self._name}: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise UserError(
                f"{self._name}: head_dim {self.head_dim} is odd; rotary embedding needs an even one."
            )
        if self.draft_vocab_size is not None and not (
            _is_count(self.draft_vocab_size) and self.draft_vocab_size <= self.vocab_size
        ):
            raise UserError(
                f"{self._name}: draft_vocab_size is {self.draft_vocab_size!r}; "
                f"it must lie between 1 and vocab_size {self.vocab_size}."
            )
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type not in ("default", "llama3"):
            raise UserError(
                f"{self._name}: rope_type {rope_type!r} is not supported; use 'default' or 'llama3'."
            )
        if not _is_positive(self.rope_parameters.get("rope_theta")):
            raise UserError(f"{self._name}: rope_parameters needs a positive rope_theta.")
        if rope_type == "llama3":
            for name in (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ):
                if not _is_positive(self.rope_parameters.get(name)):
                    raise UserError(f"{self._name}: rope_type 'llama3' needs a positive {name}.")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )
