"""Configuration of Medusa heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2.config import MOST_LAYERS


class MedusaTreesConfig(PretrainedConfig):
    """Sizes of Medusa heads. vLLM has a `medusa` of its own, which drafts chains; hence another model type.

    Args:
        hidden_size: d, the target's hidden size.
        vocab_size: rows of the target's lm_head.
        num_heads: depths, 5 as published.
        num_hidden_layers: residual blocks per head, 1 as published.
        own_lm_heads: whether each head has an output layer of its own, as the first published checkpoints have;
            otherwise all read the target's lm_head, as later ones do.
        draft_vocab_size: number of token ids in the checkpoint's `draft_vocab`, or None for all.
        max_position_embeddings: largest position plus one that the target supports; of no use to the heads.
        target: name of the target model, for error messages and model cards.
        target_probe: what `probe_lm_head` measured on the target, or None if unknown.
        first_acceptance: share of steps whose likeliest draft token is accepted, as `clover-vllm eval` measured it.

    Raises:
        UserError: a size that cannot work.
    """

    model_type = "medusa_trees"

    def __init__(
        self,
        hidden_size: int = 64,
        vocab_size: int = 101,
        num_heads: int = 5,
        num_hidden_layers: int = 1,
        own_lm_heads: bool = False,
        draft_vocab_size: int | None = None,
        max_position_embeddings: int = 2048,
        target: str | None = None,
        target_probe: Sequence[float] | None = None,
        first_acceptance: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.num_heads = num_heads
        self.num_hidden_layers = num_hidden_layers
        self.own_lm_heads = own_lm_heads
        self.draft_vocab_size = draft_vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.num_attention_heads = 1  # vLLM asks every model
        self.target = target
        self.target_probe = None if target_probe is None else list(target_probe)
        self.first_acceptance = first_acceptance
        self.check()
        kwargs.pop("num_attention_heads", None)
        kwargs.setdefault("tie_word_embeddings", False)
        kwargs.setdefault("architectures", ["MedusaTreesDraftModel"])
        super().__init__(**kwargs)

    def check(self) -> None:
        """Raise UserError, one sentence, for the first size that cannot work."""
        most = {
            "num_heads": MOST_LAYERS,
            "num_hidden_layers": MOST_LAYERS,
            "draft_vocab_size": self.vocab_size,
        }
        for name in ("hidden_size", "vocab_size", "num_heads", "num_hidden_layers", "draft_vocab_size"):
            value = getattr(self, name)
            if name == "draft_vocab_size" and value is None:
                continue
            if type(value) is not int or value < 1 or value > most.get(name, value):
                bound = f" and at most {most[name]}" if name in most else ""
                raise UserError(
                    f"MedusaTreesConfig: {name} is {value!r}; it must be a whole number of 1 or more{bound}."
                )
        share = self.first_acceptance
        if share is not None and not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise UserError(
                f"MedusaTreesConfig: first_acceptance is {share!r}; it must be a number from 0 to 1, or null."
            )
