"""Published EAGLE-1 checkpoints into the folder that we read, and vLLM's `eagle` too where it can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.clover2.init import config_for_target
from clover_vllm.heads.convert import check_folders
from clover_vllm.heads.eagle1.model import Eagle1DraftModel
from clover_vllm.heads.weights import (
    check_target,
    check_tensors,
    read_config,
    read_tensors,
    write_checkpoint,
)


def is_published(names: Sequence[str]) -> bool:
    """Whether tensors of these names are a published EAGLE-1 checkpoint's."""
    return any(name.removeprefix("model.") == "fc.weight" for name in names)


def convert(source: Path, output: Path, target: str | None = None) -> Clover2Config:
    """Read a published checkpoint and write a head folder.

    The copy of the target's embeddings is left out: drafting takes the target's own. Where the published fc has a
    bias, vLLM's `eagle` has no place for it; we draft with it.

    Args:
        source: folder with config.json (a Llama's) and weights.
        output: folder to write.
        target: target folder or hub name to check against.

    Raises:
        UserError: unreadable, or tensors missing, unexpected or misshapen (all are listed).
    """
    check_folders(source, output)
    fields = read_config(source)
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_tensors(source).items()}
    embed = tensors.pop("embed_tokens.weight", None)
    tensors = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    config = config_for_target(LlamaConfig.from_dict(fields))
    with torch.device("meta"):
        head = Eagle1DraftModel(config, fc_bias="fc.bias" in tensors)
    check_tensors(tensors, head.state_dict(), str(source))
    if target is not None:
        from clover_vllm.target.frozen import FrozenTarget

        frozen = FrozenTarget(target, torch.bfloat16)
        check_target(config, frozen.config)
        if embed is not None and not _close(embed, frozen.embed_tokens):
            raise UserError(f"{source}: its embed_tokens are not those of the target {target}.")
    llama = LlamaConfig.from_dict(fields | {"num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]})
    write_checkpoint(
        {n: t.contiguous() for n, t in tensors.items()}, llama.to_json_string(use_diff=False), output
    )
    return config


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours.float(), theirs.float(), atol=0.01, rtol=0.01)
