"""What is compared: plain vLLM, its own methods, and Clover-2."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.base.paths import shipped_head
from clover_vllm.tree import MAX_NODES

NGRAM_TOKENS = (3, 2, 5)
SUFFIX_TOKENS = (8, 4, 16)
EAGLE_CHAINS = (3, 2, 4)
CLOVER_CHAINS = (4, 2, 3)
"""Settings that are swept; the first is used where nothing is."""


HINDSIGHT = "hindsight"
"""Adaptive trees whose nodes are chosen with the answers known: a bound, not a method."""


@dataclass(frozen=True)
class Method:
    """One way of decoding, with its settings."""

    name: str
    speculative: dict[str, Any] | None = field(hash=False)  # of vLLM; None is plain decoding
    settings: str = ""  # in words


def known_grids(head: str, eagle_head: str) -> dict[str, list[Method]]:
    """Every method's possible settings by name, the default first."""
    ngram = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    grids = [
        [Method("plain", None)],
        [_method("ngram", k, ngram, "{} tokens, n-grams of 2 to 4") for k in NGRAM_TOKENS],
        [_method("suffix", k, {"method": "suffix"}, "{} tokens") for k in SUFFIX_TOKENS],
        [_method("eagle", k, {"method": "eagle", "model": eagle_head}, "chain of {}") for k in EAGLE_CHAINS],
        [_method("clover-chain", k, _clover(head) | {"tree": "chain"}, "chain of {}") for k in CLOVER_CHAINS],
        [_method("clover-published", 25, _clover(head) | {"tree": "published"}, "published tree of {}")],
        [_method("clover", 16, _clover(head), "adaptive, at most {} nodes")],
        [
            _method(
                "clover-head",
                16,
                _clover(head) | {"retrieval": "off"},
                "adaptive, at most {} nodes, head alone",
            )
        ],
        [Method(HINDSIGHT, {**_clover(head), "num_speculative_tokens": 16}, "adaptive, answers known")],
    ]
    return {grid[0].name: grid for grid in grids}


def clover_tree(head: str, nodes: int) -> Method:
    """Clover-2 with trees of at most `nodes` nodes, nothing to sweep."""
    return _method(f"clover-{nodes}", nodes, _clover(head) | {"tree": "best_first"}, "tree of {}")


def _clover(head: str) -> dict[str, Any]:
    return {"method": "clover2", "model": head}


def _method(name: str, tokens: int, speculative: dict[str, Any], settings: str) -> Method:
    return Method(name, {**speculative, "num_speculative_tokens": tokens}, settings.format(tokens))


def select(names: Sequence[str], head: str | None, eagle_head: str | None) -> list[list[Method]]:
    """Grids of methods by name, `plain` first: everything is compared with it.

    Args:
        names: of `known_grids`, or `clover-N`.
        head: Clover-2 head, by default the shipped one.
        eagle_head: EAGLE head in vLLM's form, by default the shipped baseline.

    Raises:
        UserError: an unknown name, or a method whose package is missing.
    """
    clover = head or str(shipped_head())
    eagle = eagle_head or str(shipped_head().parent / "smollm2-135m-eagle1")
    known = known_grids(clover, eagle)
    chosen = [known["plain"]]
    for name in names:
        number = name.removeprefix("clover-")
        if name not in known and number != name and number.isdigit() and 0 < int(number) <= MAX_NODES:
            chosen.append([clover_tree(clover, int(number))])
        elif name not in known:
            raise UserError(
                f"There is no method {name!r}; choose from {', '.join(known)}, or clover-N for N nodes, at most {MAX_NODES}."
            )
        elif name == "suffix" and importlib.util.find_spec("arctic_inference") is None:
            raise UserError(
                "The method suffix needs the package arctic-inference; install it or leave it out."
            )
        elif name != "plain":
            chosen.append(known[name])
    return list({grid[0].name: grid for grid in chosen}.values())
