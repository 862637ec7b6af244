"""Clover-2 heads on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.heads.clover2.model import Clover2DraftModel


def load_head(
    folder: str | Path, dtype: torch.dtype | None = torch.float32, config: Clover2Config | None = None
) -> Clover2DraftModel:
    """Read a Clover-2 head; see `heads.saved.SavedHead.read`."""
    return Clover2DraftModel.read(Path(folder), dtype, config)


def save_head(
    head: Clover2DraftModel,
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
) -> None:
    """Write a head; see `heads.saved.SavedHead.write`."""
    head.write(Path(folder), dtype, max_shard_size)
