"""Folders of heads, whatever the method: Hugging Face's config.json and safetensors, whole or refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import whole_folder

if TYPE_CHECKING:
    from clover_vllm.heads.base import HeadConfig

PROBED_ROWS = 8


def probe_lm_head(weight: torch.Tensor) -> list[float]:
    """RMS of eight evenly spaced lm_head rows: tells targets of equal sizes apart.

    A fine-tuned or quantised copy of the same model stays within a few percent.

    Args:
        weight: [V, D].
    """
    rows = weight[torch.linspace(0, weight.shape[0] - 1, PROBED_ROWS).long()]
    return [round(x, 6) for x in rows.double().square().mean(dim=1).sqrt().tolist()]


def check_target(config: HeadConfig, target_config: Any, lm_head: torch.Tensor | None = None) -> None:
    """Refuse a target that the head was not made for.

    Args:
        config: the head's.
        target_config: the target's text configuration.
        lm_head: [V, D], when it is at hand; compared with the head's `target_probe`.

    Raises:
        UserError: a size differs, or the lm_head is another model's.
    """
    made_for = f"this head was made for {config.target or 'a target'}"
    for name in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(config, name), getattr(target_config, name, None)
        if ours != theirs:
            raise UserError(
                f"Head and target do not fit: {made_for} with {name} {ours}, but the target has {theirs}."
            )
    if lm_head is not None:
        check_probe(config, probe_lm_head(lm_head))


def check_probe(config: HeadConfig, measured: Sequence[float]) -> None:
    """Refuse another model's lm_head of the right size.

    Args:
        config: the head's.
        measured: by `probe_lm_head`, on the target.

    Raises:
        UserError: it is not what the head was made for.
    """
    if config.target_probe is None:
        return
    made = config.target_probe
    if not isinstance(made, list) or [type(a) in (int, float) for a in made] != [True] * len(measured):
        raise UserError(f"The head's config.json is damaged: target_probe must be {len(measured)} numbers.")
    if any(abs(a - b) > 0.1 * max(a, b) for a, b in zip(made, measured, strict=True)):
        raise UserError(
            f"Head and target do not fit: this head was made for {config.target or 'a target'}, and this "
            "target's lm_head is another model's although its sizes are the same; give the head its own "
            "target."
        )


def check_target_folder(config: HeadConfig, folder: Path, tied: bool) -> None:
    """`check_probe` on a target that is not loaded yet, from the few rows that it needs.

    A folder that does not show a plain lm_head (quantised, other names, not safetensors, damaged) passes: the
    worker looks again, at the loaded one.

    Args:
        config: the head's.
        folder: of the target.
        tied: whether its lm_head is its embedding.

    Raises:
        UserError: the lm_head is another model's.
    """
    wanted = "embed_tokens.weight" if tied else "lm_head.weight"
    rows = None
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    if f".{name}".endswith(f".{wanted}"):
                        rows = _probed_rows(file.get_slice(name), config)
        except (SafetensorError, OSError):
            return
    if rows is not None:
        check_probe(config, probe_lm_head(rows))


def _probed_rows(weight: Any, config: HeadConfig) -> torch.Tensor | None:
    """The rows that `probe_lm_head` takes of a [V, D] tensor in a file, or None if it is another kind of tensor."""
    shape = weight.get_shape()
    if len(shape) != 2 or shape[0] < config.vocab_size or shape[1] != config.hidden_size:
        return None
    if weight.get_dtype() not in ("F64", "F32", "F16", "BF16"):  # quantised rows have scales elsewhere
        return None
    index = torch.linspace(0, config.vocab_size - 1, PROBED_ROWS).long().tolist()
    return torch.cat([weight[i : i + 1] for i in index])


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a head folder.

    Raises:
        UserError: it is missing or not JSON.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"Head folder {folder} does not exist; give a folder with config.json and weights.")
    if not path.is_file():
        raise UserError(f"Head folder {folder} has no config.json.")
    try:
        fields = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return fields


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder: single or sharded safetensors, else single or sharded .bin, else .pt.

    Raises:
        UserError: no weights, a missing shard, or a file that cannot be read.
    """
    files = _weight_files(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"Weight file {file} is named by the folder's index but missing.")
        tensors |= _read_file(file)
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    for kind in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{kind}.index.json"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is not a weight index ({error!r}).") from error
            if any(Path(name).name != name for name in names):
                raise UserError(f"{index} names files outside its folder.")
            return [folder / name for name in sorted(names)]
        if (folder / kind).is_file():
            return [folder / kind]
    for pattern in ("*.safetensors", "*.bin", "*.pt"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise UserError(f"Head folder {folder} holds no weights (model.safetensors or pytorch_model.bin).")


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix in (".bin", ".pt"):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(loaded, dict) or not all(
                isinstance(value, torch.Tensor) for value in loaded.values()
            ):
                raise UserError(f"Weight file {file} does not hold a dictionary of tensors.")
            return loaded
        with safe_open(file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except UserError:
        raise
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"Weight file {file} is damaged or not a weight file ({reason}); copy it again."
        ) from error
    except Exception as error:  # unpickling hostile bytes can raise anything
        raise UserError(f"Weight file {file} cannot be read ({type(error).__name__}).") from error


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; integers never are."""
    if not tensor.is_floating_point():
        return True
    # The 8-bit types do not have the test.
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def check_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], where: str
) -> None:
    """Compare names, shapes and types, and look for NaN and infinity.

    Raises:
        UserError: lists what is missing, unexpected, misshapen or not finite.
    """
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    broken = [name for name, tensor in sorted(tensors.items()) if not is_finite(tensor)]
    whole = [
        name
        for name in sorted(expected.keys() & tensors.keys())
        if expected[name].is_floating_point() != tensors[name].is_floating_point()
    ]
    problems = []
    for what, names in (
        ("missing", missing),
        ("of another type", whole),
        ("unexpected", unexpected),
        ("of another shape", misshapen),
        ("not finite (NaN or infinity)", broken),
    ):
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            problems.append(f"{what}: {', '.join(names[:6])}{more}")
    if problems:
        raise UserError(f"Weights of {where} do not fit its config: {'; '.join(problems)}.")


def check_draft_vocab(ids: torch.Tensor, vocab_size: int, where: str) -> None:
    """Draft vocabularies are int64, increasing, and within the target's.

    Raises:
        UserError: they are not.
    """
    if ids.dtype != torch.int64:
        raise UserError(f"Weights of {where}: draft_vocab is {ids.dtype}, it must be int64.")
    increasing = bool((ids[1:] > ids[:-1]).all())
    if not increasing or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        raise UserError(
            f"Weights of {where}: draft_vocab must hold increasing token ids between 0 and {vocab_size - 1}."
        )


def write_checkpoint(
    tensors: dict[str, torch.Tensor], config_json: str, folder: Path, max_shard_size: str = "5GB"
) -> None:
    """config.json and safetensors into `folder`, which is never seen half written.

    Files that are neither weights nor config (a model card) are carried over.

    Raises:
        UserError: a tensor is not finite, or the folder cannot be written.
    """
    broken = sorted(n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all())
    if broken:
        raise UserError(f"{folder} is not written: {broken[0]} is not finite, so training has diverged.")
    try:
        with whole_folder(folder) as fresh:
            save_torch_state_dict(tensors, fresh, max_shard_size=max_shard_size)
            (fresh / "config.json").write_text(config_json)
            for path in folder.iterdir() if folder.is_dir() else ():
                if not _OWN_FILES.fullmatch(path.name) and path.is_file():
                    shutil.copy2(path, fresh / path.name)
    except OSError as error:
        raise UserError(f"Head folder {folder} cannot be written ({error.strerror or error}).") from error


_OWN_FILES = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
