"""The methods of drafting that we know. A new one is a folder of its own and a line here.

Light on purpose: the command line reads this before anything is done, so heads are imported where
they are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clover_vllm.base.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from clover_vllm.heads.base import Head


@dataclass(frozen=True)
class HeadKind:
    """A method of drafting."""

    method: str  # its name on the command line
    title: str  # its name in text
    head: str  # its subclass of `heads.base.Head`, as module:class
    model_type: str  # of its config.json
    regression: float  # weight of SmoothL1 in its published loss
    vocabulary: float  # weight of the cross entropy there
    decay: float = 0.7  # how much less a depth weighs there than the one before
    of_tokens: bool = False  # whether that entropy is of the text's tokens, not of the target's distribution
    config: str | None = None  # its configuration, as module:class; None: vLLM knows it and drafts with it
    convert: str | None = None  # reads a published checkpoint and writes a head folder, as module:function
    published: str | None = None  # whether tensors of these names are such a checkpoint's, as module:function
    shaped_by: tuple[str, ...] = ()  # fields of the configuration of a new head that `train` has options for
    on_ranks: bool = False  # whether our engine drafts with it on several ranks
    on_v2: bool = False  # whether it does on vLLM's V2 model runner
    records_acceptance: bool = True  # whether servers compare themselves with config.json's first_acceptance

    @property
    def trees(self) -> bool:
        """Whether our engine drafts with it; others are served by vLLM's own methods."""
        return self.config is not None

    def head_class(self) -> type[Head]:
        """The class, imported now."""
        found: type[Head] = imported(self.head)
        return found

    def config_class(self) -> type[PretrainedConfig]:
        """The same of the configuration, for methods with trees."""
        assert self.config is not None, self.method
        found: type[PretrainedConfig] = imported(self.config)
        return found


def imported(place: str) -> Any:
    """What `module:name` names."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


_KINDS = (
    HeadKind(
        method="clover2",
        title="Clover-2",
        head="clover_vllm.heads.clover2.model:Clover2DraftModel",
        model_type="clover2",
        config="clover_vllm.heads.clover2.config:Clover2Config",
        convert="clover_vllm.heads.clover2.convert:convert",
        shaped_by=("num_hidden_layers", "norm_state", "target_layers"),
        on_ranks=True,
        on_v2=True,
        regression=10.0,
        vocabulary=1.0,
    ),
    HeadKind(
        method="clover1",
        title="Clover",
        head="clover_vllm.heads.clover1.model:Clover1DraftModel",
        model_type="clover1",
        config="clover_vllm.heads.clover1.config:Clover1Config",
        regression=0.0,
        vocabulary=1.0,
        of_tokens=True,
    ),
    HeadKind(
        method="medusa",
        title="Medusa",
        head="clover_vllm.heads.medusa.model:MedusaTreesDraftModel",
        model_type="medusa_trees",  # `medusa` is vLLM's, without trees
        config="clover_vllm.heads.medusa.config:MedusaTreesConfig",
        convert="clover_vllm.heads.medusa.convert:convert",
        published="clover_vllm.heads.medusa.convert:is_published",
        regression=0.0,
        vocabulary=1.0,
        decay=0.8,
        of_tokens=True,
    ),
    HeadKind(
        method="eagle1",
        title="EAGLE-1",
        head="clover_vllm.heads.eagle1.model:Eagle1DraftModel",
        model_type="llama",  # vLLM's `eagle` loads a Llama of one layer
        convert="clover_vllm.heads.eagle1.convert:convert",
        published="clover_vllm.heads.eagle1.convert:is_published",
        regression=1.0,
        vocabulary=0.1,
        records_acceptance=False,
    ),
)
HEADS: dict[str, HeadKind] = {kind.method: kind for kind in _KINDS}
TREE_HEADS: dict[str, HeadKind] = {kind.model_type: kind for kind in _KINDS if kind.trees}
"""Those that our engine drafts with, by model type."""


def head_kind(method: str) -> HeadKind:
    """A method by its name.

    Raises:
        UserError: it is not known (lists those that are).
    """
    if method not in HEADS:
        raise UserError(f"There is no head of method {method!r}; known are {', '.join(HEADS)}.")
    return HEADS[method]


def shaped_heads(*fields: str) -> str:
    """Titles of the methods that have all of these fields of a new head's configuration."""
    return " and ".join(kind.title for kind in HEADS.values() if set(fields) <= set(kind.shaped_by))


def kind_of_config(fields: dict[str, Any], where: str | Path) -> HeadKind:
    """The method of a head, by its config.json's fields.

    Raises:
        UserError: it is none that we know (lists those that are).
    """
    model_type = fields.get("model_type")
    for kind in HEADS.values():
        if kind.model_type == model_type:
            return kind
    known = ", ".join(f"{kind.model_type!r} for {kind.title}" for kind in HEADS.values())
    raise UserError(
        f"{where} holds no head that we know: its config.json says model_type {model_type!r}, known are {known}; "
        "convert a published checkpoint with `clover-vllm convert` first."
    )


def kind_of(folder: Path) -> HeadKind:
    """The method of a head folder.

    Raises:
        UserError: it holds no config.json, or none of a head that we know.
    """
    from clover_vllm.heads.weights import read_config

    return kind_of_config(read_config(folder), folder)


def check_head(folder: Path, dtype: torch.dtype, config: Any = None) -> None:
    """Refuse a head folder that an engine could not draft trees with, before the engine starts.

    Args:
        folder: with config.json and weights.
        dtype: in which the engine computes.
        config: instead of the folder's config.json.

    Raises:
        UserError: no head with trees; anything missing, damaged, misshapen, or not finite in `dtype`.
    """
    from clover_vllm.heads.saved import SavedHead
    from clover_vllm.heads.weights import read_config

    wanted = read_config(folder).get("model_type") if config is None else config.model_type
    kind = TREE_HEADS.get(str(wanted), HEADS["clover2"])  # which says what else it is
    chosen = kind.head_class()
    assert issubclass(chosen, SavedHead)
    chosen.check(folder, dtype, config)
