"""Random draft trees."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from clover_vllm.tree import ROOT, DraftTrees


@st.composite
def batches_of_trees(draw: st.DrawFn) -> DraftTrees:
    """Random trees, some empty, siblings with different tokens."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    offsets = [0]
    for _ in range(draw(st.integers(1, 4))):
        used: dict[int, set[int]] = {}
        for node in range(draw(st.integers(0, 8))):
            parent = draw(st.integers(-1, node - 1))
            free = sorted(set(range(5)) - used.get(parent, set()))
            if not free:
                break
            token = draw(st.sampled_from(free))
            used.setdefault(parent, set()).add(token)
            tokens.append(token)
            parents.append(parent)
            depths.append(1 if parent == ROOT else depths[offsets[-1] + parent] + 1)
        offsets.append(len(tokens))
    as_int = {"dtype": torch.int64}
    return DraftTrees(
        torch.tensor(tokens, **as_int),
        torch.tensor(parents, **as_int),
        torch.tensor(depths, **as_int),
        torch.zeros(len(tokens)),
        torch.tensor(offsets, **as_int),
    )
