"""A published Clover-2 checkpoint into the form that we ship."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2.checkpoint import save_head
from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.clover2.model import Clover2DraftModel
from clover_vllm.heads.convert import check_folders, check_llama
from clover_vllm.heads.weights import (
    check_target,
    check_tensors,
    probe_lm_head,
    read_config,
    read_tensors,
)

PUBLISHED_ROPE_THETA = 10000.0
"""The published code ignores the config's rope_theta and always rotates with this base."""

_PUBLISHED_DEFAULTS = {"num_attention_heads": 32, "num_heads": 5, "rms_norm_eps": 1e-6}
"""Of the published configuration class, for what config.json leaves out and no tensor shows."""

_COPIES = ("lm_head.weight", "clover_embed_tokens.weight", "embed_tokens.weight")
_DERIVED = ("rotary_emb.inv_freq",)
_PREFIXES = ("checkpoint.", "model.")


def convert(
    source: Path, output: Path, target: str | None = None, dtype: torch.dtype | None = None
) -> Clover2Config:
    """Read a published checkpoint and write a head folder.

    The published layout carries copies of the target's lm_head; they are checked against each
    other (and against `target` when given) and left out. Sizes come from the tensors where these
    show them, else from the folder's config.json.

    Args:
        source: folder with config.json and weights (single or sharded safetensors, or .bin).
        output: folder to write.
        target: target folder or hub name to check against and to record.
        dtype: of the written weights; by default as in the source.

    Returns:
        the configuration written.

    Raises:
        UserError: unreadable, or tensors missing, unexpected or misshapen (all are listed).
    """
    check_folders(source, output)
    fields = read_config(source)
    if fields.get("model_type") == "clover2":
        raise UserError(f"{source} already is a Clover-2 head in our form; nothing to convert.")
    tensors = _strip_prefix(read_tensors(source))
    copies = {name: tensors.pop(name) for name in _COPIES if name in tensors}
    tensors = {n: t for n, t in tensors.items() if not n.endswith(_DERIVED)}
    config = _config(source, fields, tensors, copies)
    with torch.device("meta"):
        head = Clover2DraftModel(config)
    check_tensors(tensors, head.state_dict(), str(source))
    _check_copies(copies, source)
    if copies:
        config.target_probe = probe_lm_head(next(iter(copies.values())))
    if target is not None:
        _check_against(config, target)
    head.load_state_dict(tensors, assign=True)
    save_head(head, output, dtype or next(iter(tensors.values())).dtype)
    return config


def _strip_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Training wrappers put a common prefix before the keys."""
    for prefix in _PREFIXES:
        if any(name.startswith(f"{prefix}clover_") for name in tensors):
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _config(
    source: Path,
    fields: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    copies: dict[str, torch.Tensor],
) -> Clover2Config:
    fields = _PUBLISHED_DEFAULTS | fields
    check_llama(source, fields)
    for name in ("num_attention_heads", "num_heads"):
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise UserError(f"{source / 'config.json'}: {name} must be a whole number of 1 or more.")
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}

    def rows(name: str) -> int | None:
        return tensors[name].shape[0] if name in tensors else None

    hidden = rows("clover_norm.weight") or fields.get("hidden_size")
    heads: int = fields["num_attention_heads"]
    query = rows("layers.0.self_attn.q_proj.weight") or hidden
    head_dim = query // heads if isinstance(query, int) and heads else None
    kv = rows("layers.0.self_attn.k_proj.weight")
    vocab = next((c.shape[0] for c in copies.values()), fields.get("vocab_size"))
    return Clover2Config(
        hidden_size=hidden,  # type: ignore[arg-type]
        intermediate_size=rows("layers.0.mlp.gate_proj.weight") or fields.get("intermediate_size"),  # type: ignore[arg-type]
        num_attention_heads=heads,
        num_key_value_heads=kv // head_dim if kv and head_dim else fields.get("num_key_value_heads"),
        head_dim=head_dim,
        num_hidden_layers=len(layers) or 2,
        num_heads=fields["num_heads"],
        vocab_size=vocab,  # type: ignore[arg-type]
        rms_norm_eps=fields["rms_norm_eps"],
        rope_theta=PUBLISHED_ROPE_THETA,
        max_position_embeddings=fields.get("max_position_embeddings", 2048),
        attention_bias="layers.0.self_attn.q_proj.bias" in tensors,
        target=fields.get("_name_or_path") or None,
    )


def _check_copies(copies: dict[str, torch.Tensor], source: Path) -> None:
    """Drafting takes both from the target's lm_head, so they must be one and the same."""
    head, embed = copies.get("lm_head.weight"), copies.get("clover_embed_tokens.weight")
    if head is not None and embed is not None and not torch.equal(head, embed):
        raise UserError(
            f"{source}: clover_embed_tokens is not the lm_head, as it is in published checkpoints; "
            "heads with embeddings of their own are not supported."
        )


def _check_against(config: Clover2Config, target: str) -> None:
    from clover_vllm.target.frozen import FrozenTarget

    frozen = FrozenTarget(target, torch.bfloat16)
    check_target(config, frozen.config, frozen.lm_head)
    config.target = Path(target).name
    config.target_probe = probe_lm_head(frozen.lm_head)
