"""The frozen target through transformers: hidden states, final norm, lm_head."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from clover_vllm.base.errors import UserError


class FrozenTarget:
    """A target model that is only read.

    Attributes:
        config: its text configuration.
        lm_head: [V, D], the weight of its output layer; also the head's token embeddings.
        layers: its decoder layers.
        norm: its final norm.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """Load from a Hugging Face folder or hub name.

        Raises:
            UserError: it cannot be loaded, or has no Llama-like structure.
        """
        model = _load(path, dtype, device).eval().requires_grad_(False)
        body = getattr(model, "model", None)
        if body is None or not all(hasattr(body, name) for name in ("layers", "norm", "embed_tokens")):
            raise UserError(
                f"Target {path} ({type(model).__name__}) has no model.layers and model.norm; "
                "Clover-2 heads need a Llama-like target."
            )
        self.config: Any = model.config.get_text_config()
        self.path = str(path)
        self.dtype = dtype
        self.device = torch.device(device)
        self.lm_head: torch.Tensor = model.get_output_embeddings().weight
        self.embed_tokens: torch.Tensor = model.get_input_embeddings().weight
        self.layers: nn.ModuleList = body.layers
        self.norm: nn.Module = body.norm
        self._body = body

    @property
    def name(self) -> str:
        """Of its folder, or the last part of its hub name."""
        return Path(self.path).name

    def fingerprint(self) -> str:
        """A digest of the config and of the beginning of every weight: tells fine-tuned copies apart."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True, default=str).encode())
        for name, tensor in self._body.state_dict().items():
            start = tensor.flatten()[:64].float().cpu()
            digest.update(name.encode() + start.numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def hidden_states(self, token_ids: torch.Tensor, layers: Sequence[int] = ()) -> torch.Tensor:
        """Pre-norm hidden states of the last layer, behind what enters some earlier ones.

        Args:
            token_ids: int64 [B, T], padded on the right with anything (causal attention never
                lets a real position see the padding).
            layers: numbers of the earlier layers, increasing.

        Returns:
            [B, T, (layers + 1) D] in the target's dtype.
        """
        seen: list[torch.Tensor] = []
        handles = [
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            for module in (*(self.layers[i] for i in layers), self.norm)
        ]
        try:
            self._body(input_ids=token_ids.to(self.device, non_blocking=True), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(seen, dim=-1) if layers else seen[0]

    def check_finite(self, hidden: torch.Tensor) -> None:
        """Refuse a target whose weights are broken.

        Raises:
            UserError: hidden states are not finite.
        """
        if not torch.isfinite(hidden).all():
            raise UserError(
                f"Target {self.path} computes NaN or infinity; its weights are damaged, or it needs "
                "another --dtype."
            )


def check_loadable(path: str | Path) -> Any:
    """Refuse what is no model before an engine is started for it.

    Returns:
        its tokenizer.

    Raises:
        UserError: no config or no tokenizer can be read there.
    """
    try:
        AutoConfig.from_pretrained(path)
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a malformed config can raise anything
        raise _unloadable(path, error) from error


def _unloadable(path: str | Path, error: Exception) -> UserError:
    folder = Path(path)
    if folder.is_dir() and (folder / "config.json").is_file():
        if 'DraftModel"' in (folder / "config.json").read_text(errors="replace"):  # of its architectures
            return UserError(f"{path} is a draft head, not a target; give the model that it drafts for.")
    elif folder.is_absolute() or str(path).startswith("."):
        return UserError(
            f"Target folder {path} does not exist or has no config.json; "
            "`clover-vllm target smollm2-135m` makes one."
        )
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return UserError(
        f"Target {path} cannot be loaded ({reason}); give a Hugging Face folder of a causal "
        "language model, for example the one that `clover-vllm target smollm2-135m` makes."
    )


def _load(path: str | Path, dtype: torch.dtype, device: torch.device | str) -> Any:
    placed = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
    try:
        config = AutoConfig.from_pretrained(path)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, **placed
        )
    except Exception as error:  # damaged weights and malformed configs can raise anything
        raise _unloadable(path, error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"Target {path} lacks {len(missing)} of its weights ({', '.join(missing[:3])}); copy it again."
        )
    return model
