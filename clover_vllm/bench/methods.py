"""What is compared: plain vLLM, its own methods, and Clover-2."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.base.paths import shipped_head
from clover_vllm.tree import MAX_NODES

CLOVER_TREES = (4, 8, 16)
CLOVER_CHAIN = 4


@dataclass(frozen=True)
class Method:
    """One way of decoding."""

    name: str
    speculative: dict[str, Any] | None  # of vLLM; None is plain decoding


def known_methods(head: str, eagle_head: str) -> dict[str, Method]:
    """Every method by name; `clover-N` is a tree of N nodes for any N."""
    found = [
        Method("plain", None),
        Method("ngram", {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}),
        Method("suffix", {"method": "suffix", "num_speculative_tokens": 8}),
        Method("eagle", {"method": "eagle", "model": eagle_head, "num_speculative_tokens": 3}),
        Method(
            "clover-chain",
            {"method": "clover2", "model": head, "num_speculative_tokens": CLOVER_CHAIN, "tree": "chain"},
        ),
    ]
    found += [clover_tree(head, nodes) for nodes in CLOVER_TREES]
    return {method.name: method for method in found}


def clover_tree(head: str, nodes: int) -> Method:
    """Clover-2 with trees of at most so many nodes."""
    return Method(f"clover-{nodes}", {"method": "clover2", "model": head, "num_speculative_tokens": nodes})


def select(names: Sequence[str], head: str | None, eagle_head: str | None) -> list[Method]:
    """Methods by name, `plain` first: everything is compared with it.

    Args:
        names: of `known_methods`.
        head: Clover-2 head, by default the shipped one.
        eagle_head: EAGLE head in vLLM's form, by default the shipped baseline.

    Raises:
        UserError: an unknown name, or a method whose package is missing.
    """
    clover = head or str(shipped_head())
    eagle = eagle_head or str(shipped_head().parent / "smollm2-135m-eagle1")
    known = known_methods(clover, eagle)
    chosen = [known["plain"]]
    for name in names:
        number = name.removeprefix("clover-")
        if name not in known and number != name and number.isdigit() and 0 < int(number) <= MAX_NODES:
            chosen.append(clover_tree(clover, int(number)))
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
    return list({method.name: method for method in chosen}.values())
