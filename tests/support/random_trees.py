"""Random draft trees."""

from __future__ import annotations

from hypothesis import strategies as st

from clover_vllm.tree import Tree


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """A random tree, perhaps empty, whose siblings carry different tokens below 5."""
    tokens: list[int] = []
    parents: list[int] = []
    used: dict[int, set[int]] = {}
    for node in range(draw(st.integers(0, 12))):
        parent = draw(st.integers(-1, node - 1))
        free = sorted(set(range(5)) - used.get(parent, set()))
        if not free:
            break
        token = draw(st.sampled_from(free))
        used.setdefault(parent, set()).add(token)
        tokens.append(token)
        parents.append(parent)
    return Tree(tokens, parents)
