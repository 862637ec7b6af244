"""The golden checkpoint, in the form that the paper's authors publish."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import DATA

GOLDEN = DATA / "clover2_published_tiny.safetensors"


def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def published_folder(folder: Path, form: str) -> Path:
    """The golden checkpoint as a published folder: config.json and weights in one of three forms."""
    folder.mkdir()
    with safe_open(GOLDEN, framework="pt") as file:
        sizes = {k: json.loads(v) for k, v in file.metadata().items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
    tensors = {n.removeprefix("checkpoint."): t for n, t in golden().items() if n.startswith("checkpoint.")}
    if form == "single":
        save_file(tensors, folder / "model.safetensors")
    elif form == "sharded":
        save_torch_state_dict(tensors, folder, max_shard_size="60KB")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder
