"""A new head for a target: its configuration, its scale constants, its first weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.clover2.model import Clover2DraftModel, ResAttentionBlock
from clover_vllm.heads.layers import DecoderLayer, RMSNorm
from clover_vllm.heads.weights import probe_lm_head

if TYPE_CHECKING:
    from clover_vllm.heads.base import NewHead
    from clover_vllm.target.frozen import FrozenTarget


def config_for_target(target_config: Any, **overrides: Any) -> Clover2Config:
    """A head configuration with the target's sizes and rotary settings.

    Args:
        target_config: the target's Hugging Face text configuration.
        overrides: fields of Clover2Config that win over the target's.

    Raises:
        UserError: the target lacks a size that the head needs, or has one it cannot use.
    """
    return Clover2Config(**(_target_fields(target_config) | overrides))


def _target_fields(target_config: Any) -> dict[str, Any]:
    """Fields of a configuration that are the target's.

    Raises:
        UserError: the target lacks one, or has one that cannot be used.
    """
    fields: dict[str, Any] = {}
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
    ):
        value = getattr(target_config, name, None)
        if value is None:
            raise UserError(
                f"The target's config has no {name}; Clover-2 heads need a Llama-like target "
                "(RMSNorm, rotary positions, gated MLP)."
            )
        fields[name] = value
    for name in ("num_key_value_heads", "head_dim"):
        fields[name] = getattr(target_config, name, None)
    fields["attention_bias"] = has_attention_bias(target_config)
    fields["qk_norm"] = getattr(target_config, "model_type", "") == "qwen3"
    act = getattr(target_config, "hidden_act", "silu")
    if act != "silu":
        raise UserError(f"The target's activation is {act}; Clover-2 heads need a Llama-like target (silu).")
    rope = getattr(target_config, "rope_parameters", None)
    if rope:
        fields["rope_parameters"] = dict(rope)
    elif getattr(target_config, "rope_theta", None):
        fields["rope_theta"] = target_config.rope_theta
    fields["target"] = getattr(target_config, "_name_or_path", None) or None
    return fields


def config_for_new(target: FrozenTarget, wanted: NewHead) -> Clover2Config:
    """`config_for_target` with the scales of the target's states and with what is wanted.

    Raises:
        UserError: as `config_for_target` does.
    """
    return Clover2Config(**config_fields_for_new(target, wanted))


def config_fields_for_new(target: FrozenTarget, wanted: NewHead) -> dict[str, Any]:
    """Fields of the configuration of a new head.

    Raises:
        UserError: as `config_for_target` does, or `target_layers` are asked for that the target does not have.
    """
    if any(i >= target.config.num_hidden_layers for i in wanted.fields.get("target_layers", ())):
        raise UserError(
            f"--target-layers must be below {target.config.num_hidden_layers}, the target's number of layers."
        )
    hidden_scale, embed_scale = measure_scales(wanted.hidden, target.lm_head.cpu(), wanted.token_ids)
    return (
        _target_fields(target.config)
        | {
            "num_heads": wanted.num_heads,
            "draft_vocab_size": None if wanted.draft_vocab is None else len(wanted.draft_vocab),
            "hidden_scale": hidden_scale if wanted.scale_inputs else 1.0,
            "embed_scale": embed_scale if wanted.scale_inputs else 1.0,
            "target": target.name,
            "target_probe": probe_lm_head(target.lm_head),
        }
        | dict(wanted.fields)
    )


def has_attention_bias(target_config: Any) -> bool:
    """Whether the target's q, k and v projections have a bias (Qwen2 always has one)."""
    if getattr(target_config, "model_type", "") == "qwen2":
        return True
    return bool(getattr(target_config, "attention_bias", False))


def rms(rows: torch.Tensor) -> float:
    """Root mean square over everything, in float64."""
    return rows.double().square().mean().sqrt().item()


def measure_scales(
    hidden: torch.Tensor, lm_head: torch.Tensor, token_ids: torch.Tensor
) -> tuple[float, float]:
    """The two constants that bring the head's inputs to an RMS of 1.

    Args:
        hidden: [N, D], the target's pre-norm hidden states at ordinary positions.
        lm_head: [V, D], the target's lm_head weight.
        token_ids: [N], tokens as they occur in text, so that frequent rows weigh more.

    Returns:
        hidden_scale, embed_scale.
    """
    # The first positions of a sequence are attention sinks whose norm is far from the rest's: the
    # median over rows is what a typical row has.
    row_rms = hidden.double().square().mean(dim=-1).sqrt()
    return 1.0 / row_rms.median().item(), 1.0 / rms(lm_head[token_ids])


@torch.no_grad()
def init_from_target(
    head: Clover2DraftModel,
    target_layers: Iterable[nn.Module],
    target_norm: nn.Module,
    seed: int = 0,
) -> None:
    """First weights (paper section 3.5 and the published code).

    Augmenting layers and norms are copies of the target's last layers and final norm; the
    residual blocks' q and k are the identity plus U(0, 0.01), v is U(0, 0.01); the projectors are
    [identity | about 0]. What other target layers add is 0 at first.

    The copied layers add to a residual stream whose size the head's `hidden_scale` has changed;
    what they write (o_proj, down_proj) is scaled by the same constant, so that they change the
    stream by the same share as in the target.

    Args:
        head: gets the weights.
        target_layers: the target's decoder layers; the last `num_hidden_layers` are copied.
        target_norm: the target's final norm.
        seed: of the random parts.

    Raises:
        UserError: a target layer has another shape than the head's.
    """
    generator = torch.Generator().manual_seed(seed)
    copy_layers(head.layers, target_layers, head.config.hidden_scale)
    norms = [head.clover_norm, head.clover_head_norm]
    if head.config.norm_state:
        norms.append(head.clover_head_state_norm)
    for norm in norms:
        copy_norm(norm, target_norm)
    if head.config.target_layers:
        head.clover_mixer.mix.weight.zero_()
    for block in (head.clover_head_mlp_rnn, head.clover_head_mlp_rnn2):
        init_block(block, generator)
    size = head.config.hidden_size
    for projector in (head.clover_head_mlp, head.clover_head_mlp2):
        projector.weight.copy_(_noise(projector.weight.shape, 1e-3, generator))
        projector.weight[:, :size] += torch.eye(size)
        projector.bias.zero_()


def copy_layers(layers: nn.ModuleList, target_layers: Iterable[nn.Module], hidden_scale: float) -> None:
    """Make augmenting layers copies of the target's last ones, which write `hidden_scale` times as much.

    Raises:
        UserError: a target layer has another shape.
    """
    sources = list(target_layers)[-len(layers) :]
    for layer, source in zip(layers, sources, strict=True):
        assert isinstance(layer, DecoderLayer)
        available = source.state_dict()
        wanted = layer.state_dict()
        if available.keys() - wanted.keys():
            extra = ", ".join(sorted(available.keys() - wanted.keys()))
            raise UserError(
                f"The target's decoder layers hold {extra}, which a Llama-like layer does not; "
                "a Clover-2 head cannot start from them."
            )
        for name, tensor in wanted.items():
            found = available.get(name)
            if found is None or found.shape != tensor.shape:
                raise UserError(
                    f"The target's decoder layers have no {name} of shape {tuple(tensor.shape)}; "
                    "a Clover-2 head can only start from Llama-like layers."
                )
            tensor.copy_(found)
        layer.self_attn.o_proj.weight.mul_(hidden_scale)
        layer.mlp.down_proj.weight.mul_(hidden_scale)


def copy_norm(norm: RMSNorm, target_norm: nn.Module) -> None:
    """Make a norm the target's final one.

    Raises:
        UserError: the target's computes something else.
    """
    weight = target_norm.weight
    assert isinstance(weight, torch.Tensor)
    norm.weight.copy_(weight)
    probe = torch.linspace(-1, 1, len(weight))[None]
    ours, theirs = norm(probe), target_norm(probe.to(weight)).float().cpu()
    if not torch.allclose(ours, theirs, atol=0.02, rtol=0.02):
        raise UserError(
            f"The target's {type(target_norm).__name__} is not a plain RMSNorm; "
            "Clover-2 heads need a Llama-like target."
        )


def init_block(block: ResAttentionBlock, generator: torch.Generator) -> None:
    """q and k are the identity plus U(0, 0.01), v is U(0, 0.01)."""
    size = block.q.weight.shape[0]
    for linear in (block.q, block.k, block.v):
        linear.weight.copy_(_noise((size, size), 0.01, generator))
        linear.bias.zero_()
    block.q.weight += torch.eye(size)
    block.k.weight += torch.eye(size)
    block.input_layernorm.weight.fill_(1.0)


def _noise(shape: Iterable[int], high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(tuple(shape), generator=generator) * high
