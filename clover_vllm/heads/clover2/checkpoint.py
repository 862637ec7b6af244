"""Clover-2 heads on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.clover2.model import Clover2DraftModel
from clover_vllm.heads.weights import (
    check_draft_vocab,
    check_tensors,
    is_finite,
    read_config,
    read_tensors,
    write_checkpoint,
)


def clover2_config(folder: Path) -> Clover2Config:
    """The validated configuration of a Clover-2 head folder.

    Raises:
        UserError: missing, not JSON, another model type, or sizes that cannot work.
    """
    fields = read_config(folder)
    kind = fields.get("model_type")
    if kind != "clover2":
        raise UserError(
            f"{folder} is not a Clover-2 head: its config.json says model_type {kind!r}; "
            "convert a published checkpoint with `clover-vllm convert` first."
        )
    try:
        return Clover2Config.from_dict(fields)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is not a Clover-2 config ({error}).") from error


def load_head(
    folder: str | Path, dtype: torch.dtype | None = torch.float32, config: Clover2Config | None = None
) -> Clover2DraftModel:
    """Read a Clover-2 head.

    Args:
        folder: with config.json and weights.
        dtype: of the parameters; None keeps what the file has.
        config: instead of the folder's config.json.

    Raises:
        UserError: anything missing, damaged, misshapen or not finite.
    """
    folder = Path(folder)
    config = config or clover2_config(folder)
    tensors = read_tensors(folder)
    with torch.device("meta"):
        head = Clover2DraftModel(config)
    check_tensors(tensors, head.state_dict(), str(folder))
    if config.draft_vocab_size is not None:
        check_draft_vocab(tensors["draft_vocab"], config.vocab_size, str(folder))
    head.rotary = type(head.rotary)(config)
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    head.load_state_dict(tensors, assign=True)
    return head


def check_head(folder: Path, dtype: torch.dtype, config: Clover2Config | None = None) -> None:
    """Refuse a head folder that an engine could not draft with, before the engine starts.

    Args:
        folder: with config.json and weights.
        dtype: in which the engine computes.
        config: instead of the folder's config.json.

    Raises:
        UserError: anything missing, damaged, misshapen, or not finite in `dtype`.
    """
    for name, tensor in load_head(folder, dtype, config).state_dict().items():
        if not is_finite(tensor):
            raise UserError(
                f"Weights of {folder}: {name} is too large for {str(dtype).removeprefix('torch.')}; serve with "
                "--dtype bfloat16 or float32."
            )


def save_head(
    head: Clover2DraftModel,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> None:
    """Write a head as a Hugging Face folder; see `write_checkpoint`.

    Raises:
        UserError: a weight is not finite (training has diverged), or the folder cannot be written.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in head.state_dict().items()
    }
    head.config.dtype = dtype
    write_checkpoint(tensors, head.config.to_json_string(use_diff=False), Path(folder), max_shard_size)
