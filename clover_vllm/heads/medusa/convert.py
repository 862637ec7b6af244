"""Published Medusa checkpoints (`medusa_lm_head.pt` and later forms) into the form that we read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from clover_vllm.base.errors import UserError
from clover_vllm.heads.convert import check_folders
from clover_vllm.heads.medusa.config import MedusaTreesConfig
from clover_vllm.heads.medusa.model import MedusaTreesDraftModel
from clover_vllm.heads.weights import check_target, check_tensors, probe_lm_head, read_config, read_tensors

NAME = re.compile(r"(?:medusa_heads?\.)?(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")
"""Of a tensor: head, place in the head, and what it is; `weight` is of an output layer."""


def is_published(names: Sequence[str]) -> bool:
    """Whether tensors of these names are a published Medusa checkpoint's."""
    return all(NAME.fullmatch(name) for name in names)


def convert(source: Path, output: Path, target: str | None = None) -> MedusaTreesConfig:
    """Read a published checkpoint and write a head folder.

    The number of heads and blocks is that of the tensors: published configs have been wrong about it.

    Args:
        source: folder with config.json and weights.
        output: folder to write.
        target: target folder or hub name to check against and to record; needed where the heads have no output
            layers, which show the size of the vocabulary.

    Raises:
        UserError: unreadable, or tensors missing, unexpected or misshapen (all are listed).
    """
    check_folders(source, output)
    fields = read_config(source)
    ours, layers = _renamed(read_tensors(source), source)
    frozen = None
    if target is not None:
        from clover_vllm.target.frozen import FrozenTarget

        frozen = FrozenTarget(target, torch.bfloat16)
    if not layers and frozen is None:
        raise UserError(
            f"{source} holds Medusa heads without output layers, which read the target's lm_head; name the target with --target."
        )
    numbers = [tuple(map(int, name.split(".")[1:3])) for name in ours]
    if layers:
        ours["lm_heads"] = torch.stack([layers[i] for i in sorted(layers)])
    config = MedusaTreesConfig(
        hidden_size=next(iter(ours.values())).shape[-1],
        vocab_size=len(next(iter(layers.values()))) if layers else len(frozen.lm_head),  # type: ignore[union-attr]
        num_heads=1 + max(i for i, _ in numbers),
        num_hidden_layers=1 + max(j for _, j in numbers),
        own_lm_heads=bool(layers),
        target=fields.get("base_model_name_or_path"),
    )
    with torch.device("meta"):
        head = MedusaTreesDraftModel(config)
    check_tensors(ours, head.state_dict(), str(source))
    if frozen is not None:
        check_target(config, frozen.config, frozen.lm_head)
        config.target, config.target_probe = frozen.name, probe_lm_head(frozen.lm_head)
    head.load_state_dict(ours, assign=True)
    head.write(output, next(iter(ours.values())).dtype)
    return config


def _renamed(
    tensors: dict[str, torch.Tensor], source: Path
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Blocks by our names, and output layers by head.

    Raises:
        UserError: there are no blocks, output layers of different sizes, or of some heads only.
    """
    ours: dict[str, torch.Tensor] = {}
    layers: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        found = NAME.fullmatch(name)
        if found is None:
            raise UserError(f"{source} holds {name}, which published Medusa heads do not.")
        head, place, what = found.groups()
        if what == "weight":
            layers[int(head)] = tensor
        else:
            ours[f"heads.{head}.{place}.{what}"] = tensor
    heads = {int(name.split(".")[1]) for name in ours}
    if not heads:
        raise UserError(f"{source} holds Medusa output layers without residual blocks.")
    if layers and (layers.keys() != heads or len({tensor.shape for tensor in layers.values()}) > 1):
        raise UserError(f"{source} must hold one output layer of one size for each Medusa head, or none.")
    return ours, layers
