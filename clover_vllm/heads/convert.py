"""`clover-vllm convert`: published checkpoints of any method, told apart by the names of their tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clover_vllm.base.errors import UserError
from clover_vllm.heads.registry import HEADS, HeadKind

if TYPE_CHECKING:
    from collections.abc import Iterable

MEDUSA_NAME = re.compile(r"(?:medusa_heads?\.)?(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")
"""Of a published Medusa tensor: head, place in the head, and what it is; `weight` is of an output layer."""


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


def method_of(names: Iterable[str]) -> HeadKind:
    """The method whose published checkpoints hold tensors of these names; Clover-2 where no other does."""
    known = list(names)
    if known and all(MEDUSA_NAME.fullmatch(name) for name in known):
        return HEADS["medusa"]
    if any(name.removeprefix("model.") == "fc.weight" for name in known):
        return HEADS["eagle1"]
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
    from clover_vllm.heads.clover2 import convert as clover2
    from clover_vllm.heads.eagle1 import convert as eagle1
    from clover_vllm.heads.medusa import convert as medusa
    from clover_vllm.heads.weights import read_config, read_tensors

    check_folders(source, output)
    read_config(source)  # a folder that does not exist is named first
    kind = method_of(read_tensors(source))
    chosen = {"clover2": clover2.convert, "eagle1": eagle1.convert, "medusa": medusa.convert}[kind.method]
    return kind, chosen(source, output, target)
