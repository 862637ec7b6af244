"""`clover-vllm convert`: published checkpoints of any method, told apart by the names of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clover_vllm.base.errors import UserError
from clover_vllm.heads.registry import HEADS, HeadKind, imported

if TYPE_CHECKING:
    from collections.abc import Iterable


def check_folders(source: Path, output: Path) -> None:
    """Refuse to write over something else.

    Raises:
        UserError: the folders are the same, or the output holds files that are no head.
    """
    if output.resolve() == source.resolve():
        raise UserError(f"The output folder must not be the source {source}.")
    if output.exists() and not (output / "config.json").is_file() and any(output.glob("*")):
        raise UserError(f"{output} is not empty and holds no head; name another output folder.")


def check_llama(source: Path, fields: dict[str, Any]) -> None:
    """Refuse what published layers were computed with and ours would silently leave out.

    Args:
        source: folder of the checkpoint.
        fields: of its config.json.

    Raises:
        UserError: another activation than SiLU, or scaled rotary positions.
    """
    act, scaling = (
        fields.get("hidden_act", "silu"),
        fields.get("rope_scaling") or fields.get("rope_parameters"),
    )
    if act != "silu":
        raise UserError(
            f"{source / 'config.json'}: hidden_act is {act!r}; converted heads compute SiLU, so this one would draft badly."
        )
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else scaling
    if kind not in (None, "default"):
        raise UserError(
            f"{source / 'config.json'}: rope_scaling is {scaling!r}; a converted head rotates without, so it would draft badly."
        )


def kind_of_checkpoint(names: Iterable[str]) -> HeadKind:
    """The method whose published checkpoints hold tensors of these names; Clover-2 where no other does."""
    known = list(names)
    for kind in HEADS.values():
        if kind.published is not None and known and imported(kind.published)(known):
            return kind
    return HEADS["clover2"]


def convert(source: Path, output: Path, target: str | None = None) -> tuple[HeadKind, Any]:
    """Read a published checkpoint and write a head folder.

    Args:
        source: folder with config.json and weights (safetensors, .bin or .pt).
        output: folder to write.
        target: target folder or hub name to check against and to record.

    Returns:
        the method, and the configuration written.

    Raises:
        UserError: unreadable, or tensors missing, unexpected or misshapen (all are listed).
    """
    from clover_vllm.heads.weights import read_config, read_tensors

    check_folders(source, output)
    read_config(source)  # a folder that does not exist is named first
    kind = kind_of_checkpoint(read_tensors(source))
    assert kind.convert is not None, kind.method
    return kind, imported(kind.convert)(source, output, target)
