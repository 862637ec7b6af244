"""Clover's own options, which travel in vLLM's speculative configuration. Imports nothing of vLLM."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from clover_vllm.base.docstrings import argument_texts
from clover_vllm.base.errors import UserError
from clover_vllm.heads.registry import TREE_HEADS
from clover_vllm.tree import MAX_NODES, PUBLISHED_25, Cutoffs, Shape, chain

METHOD = "clover2"
"""The method's name in vLLM's speculative configuration."""

DEFAULT_NODES = 8
"""Tree nodes per request and step where `num_speculative_tokens` is not given, for trees of one size."""

MOST_NODES = 16
"""The same for adaptive trees, where it is an upper bound."""

ADAPTIVE_WIDTH = 4
"""Nodes per request, on average over the batch, that a level of adaptive trees expands at most."""

SHAPES = ("adaptive", "best_first", "chain", "published")


@dataclass(frozen=True)
class CloverOptions:
    """How trees are drafted.

    Args:
        tree: `adaptive` sizes the trees of all requests together, step by step, by what nodes cost and earn;
            `best_first` grows every tree to the same size by joint probability; `chain` drafts one path, as vLLM's
            own methods do; `published` is the fixed tree of the Clover-2 paper's implementation, whole with
            25 `num_speculative_tokens`; a list of paths of child ranks, such as `[[0], [1], [0, 0]]`, is a custom fixed tree.
            A fixed tree is cut to its first `num_speculative_tokens` nodes.
        draft_rounds: maximum number of drafting levels, and so maximum depth, of what the head drafts; by default
            12 for `adaptive`, and for `best_first` 4 for up to 8 nodes, 5 up to 12, 6 above.
        draft_width: nodes that each level of `best_first` expands; by default a quarter of the nodes,
            at least 2.
        draft_candidates: children considered per node in `adaptive` and `best_first`; by default the number of
            nodes, at most 8.
        draft_top_p: a child is dropped once its more likely siblings hold this share of their parent's
            probability (Clover, arXiv 2405.00263); 1 keeps all.
        draft_min_share: a child is dropped if it is less likely than this share of its best sibling;
            0 keeps all, Clover used 0.25.
        draft_min_joint: a node of `best_first` is expanded if the joint probability of its path is at
            least this; 0 expands all. A level that no request grows into is not computed on a CPU, which
            saves more time there than its tokens are worth.
        retrieval: where `adaptive` finds continuations besides the head's on the V1 model runner: `all` in a
            request's own text and in earlier answers of any request, `own` in its own text alone, so that nothing of
            a user's text reaches another's drafts, `off` nowhere. Needs the package arctic-inference.
        head_precision: `int8` for the head's products on a CPU where the engine runs in half precision, or `model`
            for the engine's own precision everywhere.
        backlog_mib: most memory, in MiB, for hidden states that the head has not read, on the V1 model runner,
            because drafting did not pay. The oldest go.
        read_window: positions that the head reads, on the V1 model runner, of a text of which it has missed many
            more, give or take half a block of the cache; it begins at the start of a block and sees nothing before it.

    Raises:
        UserError: a value that cannot work.
    """

    tree: str | list[list[int]] = "adaptive"
    draft_rounds: int | None = None
    draft_width: int | None = None
    draft_candidates: int | None = None
    draft_top_p: float = 1.0
    draft_min_share: float = 0.0
    draft_min_joint: float = 0.3
    retrieval: str = "all"
    head_precision: str = "int8"
    backlog_mib: int = 64
    read_window: int = 64

    def __post_init__(self) -> None:
        for name in ("draft_rounds", "draft_width", "draft_candidates"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 1 <= value <= MAX_NODES):
                raise UserError(
                    f"Clover's option {name} is {value!r}; it must be a whole number from 1 to {MAX_NODES}."
                )
        if self.retrieval not in ("all", "own", "off"):
            raise UserError(f"Clover's option retrieval is {self.retrieval!r}; it must be all, own or off.")
        if self.head_precision not in ("int8", "model"):
            raise UserError(
                f"Clover's option head_precision is {self.head_precision!r}; it must be int8 or model."
            )
        for name in ("backlog_mib", "read_window"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(
                    f"Clover's option {name} is {value!r}; it must be a whole number of 1 or more."
                )
        for name, low in (("draft_top_p", "above 0"), ("draft_min_share", "0"), ("draft_min_joint", "0")):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= 1 or (name == "draft_top_p" and value == 0):
                raise UserError(f"Clover's option {name} is {value!r}; it must be a number from {low} to 1.")
        self.fixed_shape(MAX_NODES)

    def fixed_shape(self, num_nodes: int) -> Shape | None:
        """The fixed tree of at most `num_nodes` nodes, or None for `adaptive` and `best_first`.

        Raises:
            UserError: the option `tree` does not describe one.
        """
        if self.tree in ("adaptive", "best_first"):
            return None
        if self.tree == "chain":
            return chain(num_nodes)
        if self.tree == "published":
            return Shape(PUBLISHED_25.paths[:num_nodes])
        form = "a list of paths of child ranks such as [[0], [1], [0, 0]]"
        if not isinstance(self.tree, list) or not self.tree or not all(map(_is_path, self.tree)):
            raise UserError(
                f"Clover's option tree is {self.tree!r}; it must be one of {', '.join(SHAPES)}, or {form}."
            )
        try:
            shape = Shape([tuple(path) for path in self.tree])
        except ValueError as error:
            raise UserError(f"Clover's option tree is not {form}: {error}") from error
        return Shape(shape.paths[:num_nodes])

    def rounds(self, num_nodes: int) -> int:
        """Drafting levels of a `best_first` tree."""
        if self.draft_rounds is not None:
            return min(num_nodes, self.draft_rounds)
        return min(num_nodes, 4 if num_nodes <= 8 else 5 if num_nodes <= 12 else 6)

    def width(self, num_nodes: int) -> int:
        """Nodes expanded per level of a `best_first` tree."""
        return self.draft_width if self.draft_width is not None else max(2, num_nodes // 4)

    def candidates(self, num_nodes: int) -> int:
        """Children considered per node: for `best_first` at most 8 by default, for a fixed tree all it needs."""
        shape = self.fixed_shape(num_nodes)
        if shape is not None:
            return shape.max_rank + 1
        return self.draft_candidates if self.draft_candidates is not None else min(num_nodes, 8)

    def level_width(self, num_nodes: int) -> int:
        """Most nodes that one drafting level expands."""
        shape = self.fixed_shape(num_nodes)
        if shape is None:
            return ADAPTIVE_WIDTH if self.tree == "adaptive" else self.width(num_nodes)
        return max(len(shape.nodes_at(depth)) for depth in range(1, shape.max_depth + 1))

    @property
    def default_nodes(self) -> int:
        """`num_speculative_tokens` where it is not given."""
        return MOST_NODES if self.tree == "adaptive" else DEFAULT_NODES

    @property
    def cutoffs(self) -> Cutoffs:
        return Cutoffs(self.draft_top_p, self.draft_min_share, self.draft_min_joint)

    def __str__(self) -> str:
        return self.tree if isinstance(self.tree, str) else f"fixed tree of {len(self.tree)} nodes"


def options_table() -> str:
    """Clover's options as a Markdown table, from the docstring of `CloverOptions`."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    meanings = argument_texts(CloverOptions.__doc__ or "")
    for field in fields(CloverOptions):
        default = "(see meaning)" if field.default is None else f"`{field.default}`"
        lines.append(f"| `{field.name}` | {default} | {meanings[field.name]} |")
    return "\n".join(lines) + "\n"


def _is_path(path: object) -> bool:
    return isinstance(path, list) and bool(path) and all(type(rank) is int for rank in path)


def asks_for_clover(given: Mapping[str, Any] | None) -> bool:
    """Whether a speculative configuration names Clover-2, or a head whose config.json says so.

    Raises:
        UserError: the method's name is close to Clover-2's, or the head was not found.
    """
    if not given:
        return False
    if given.get("method") is not None:
        method = given["method"]
        if method != METHOD and isinstance(method, str) and method.lower().startswith("clover"):
            raise UserError(f"There is no speculative method {method!r}; did you mean {METHOD!r}?")
        return bool(method == METHOD)
    model = given.get("model")
    if not isinstance(model, str) or not model:
        return False
    if re.match(r"[/~]|\.\.?/", model) or ("://" not in model and model.count("/") > 1):
        _check_local(model)
    if not Path(model).is_dir() and os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return False  # nothing is asked of another hub; "method" says it there
    try:
        found, _ = PretrainedConfig.get_config_dict(model, revision=given.get("revision"))
    except Exception:  # no such model, no network, not a model: vLLM explains that to its own methods
        if _may_be_local(model):
            _check_local(model)
        return False
    return found.get("model_type") in TREE_HEADS


def _may_be_local(model: str) -> bool:
    """Whether a name that the hub did not give can have been meant as a folder's."""
    if re.fullmatch(r"[\w-]+", model):  # with dots in it, a word can be a proposer of the user's own
        return model != "ngram" and not os.environ.get("VLLM_MODEL_REDIRECT_PATH")
    return "/" in model and "://" not in model and Path(model).parent.is_dir()


def _check_local(model: str) -> None:
    """Refuse a head's folder that vLLM would explain in many lines.

    Raises:
        UserError: it does not exist or is not a model's.
    """
    path = Path(model)
    if not path.exists():
        raise UserError(
            f'The speculative option "model" is {model!r}, which was not found; give a full path to a head\'s '
            "folder, or its name on the hub."
        )
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "params.json")):
        raise UserError(
            f'The speculative option "model" is {model!r}, a folder without config.json; give the folder of a head.'
        )


OPTION_NAMES = tuple(field.name for field in fields(CloverOptions))


def split_options(given: Mapping[str, Any], shared: tuple[str, ...]) -> tuple[dict[str, Any], CloverOptions]:
    """Separate vLLM's speculative options from Clover's own.

    Args:
        given: a speculative configuration as the user wrote it.
        shared: names of vLLM's own options that apply to Clover.

    Raises:
        UserError: an option that neither knows, or a bad value of one of Clover's.
    """
    known = (*shared, *OPTION_NAMES)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"The speculative option {name!r} does not exist for Clover-2.{hint} "
                f"Known options: {', '.join(known)}."
            )
    own = {name: value for name, value in given.items() if name in OPTION_NAMES}
    return {name: value for name, value in given.items() if name in shared}, CloverOptions(**own)
