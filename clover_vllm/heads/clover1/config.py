"""Configuration of a Clover head."""

from __future__ import annotations

from typing import Any

from clover_vllm.heads.clover2.config import Clover2Config


class Clover1Config(Clover2Config):
    """As `Clover2Config`, with the one augmenting layer that Clover published."""

    model_type = "clover1"

    def __init__(self, num_hidden_layers: int = 1, **fields: Any) -> None:
        fields.setdefault("architectures", ["Clover1DraftModel"])
        super().__init__(num_hidden_layers=num_hidden_layers, **fields)
