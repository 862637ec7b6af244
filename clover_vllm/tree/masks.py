"""Who sees whom in a verifying step, and which rows survive it.

A request's *rows* in the step are its root (row 0) and its nodes in order (row i + 1). A row sees
itself, its ancestors, the root, and the whole prefix before it; only the first three are masks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clover_vllm.tree.topology import DraftTrees
from clover_vllm.tree.walk import Accepted

MAX_NODES = 63
"""Nodes per tree: with the root, one bit each in an int64."""


def row_offsets(trees: DraftTrees) -> torch.Tensor:
    """int64 [R + 1], the first row of every request when rows are laid one request after the other."""
    return trees.offsets + torch.arange(trees.num_requests + 1, device=trees.offsets.device)


def row_depths(trees: DraftTrees) -> torch.Tensor:
    """int64 [N + R], how far each row's position lies behind its root's: 0 for roots."""
    rows = trees.depths.new_zeros(trees.depths.shape[0] + trees.num_requests)
    rows[_node_rows(trees)] = trees.depths
    return rows


def ancestor_bits(trees: DraftTrees) -> torch.Tensor:
    """Visible rows as bitmasks.

    Returns:
        int64 [N + R], bit j of a row: it sees its own request's row j. (The 64th bit is the sign.)

    Raises:
        ValueError: a tree has more than 63 nodes.
    """
    sizes = trees.offsets[1:] - trees.offsets[:-1]
    if sizes.numel() and int(sizes.max()) > MAX_NODES:
        raise ValueError(f"A tree has {int(sizes.max())} nodes; bitmasks hold {MAX_NODES}.")
    request = trees.request_of_node
    first = row_offsets(trees)[:-1]
    bits = trees.tokens.new_zeros(trees.tokens.shape[0] + trees.num_requests)
    bits[first] = 1
    nodes = _node_rows(trees)
    own = torch.ones_like(nodes) << (nodes - first[request])
    parent_rows = first[request] + trees.parents + 1
    depth = int(trees.depths.max()) if trees.depths.numel() else 0
    for level in range(1, depth + 1):  # parents are complete before their children
        at = trees.depths == level
        bits[nodes[at]] = bits[parent_rows[at]] | own[at]
    return bits


def ancestor_matrix(bits: torch.Tensor) -> torch.Tensor:
    """Bitmasks of one request's rows, int64 [n], as a boolean matrix [n, n] of (row, row seen)."""
    return ((bits[:, None] >> torch.arange(bits.shape[0], device=bits.device)) & 1).bool()


@dataclass
class Moves:
    """Rows whose keys and values must move after a walk (filled by `accepted_moves`).

    Accepted rows are to lie right behind their root, in path order. Sources never precede their
    destinations, and a gather of all sources before any write makes the order of moves irrelevant.
    """

    request: torch.Tensor  # int64 [M]
    source: torch.Tensor  # int64 [M], row within the request
    destination: torch.Tensor  # int64 [M], row within the request, below the source


def accepted_moves(accepted: Accepted) -> Moves:
    """The moves that bring accepted rows into place; rows already there are left out."""
    depth = torch.arange(accepted.nodes.shape[1], device=accepted.nodes.device)
    taken = depth < accepted.lengths[:, None]
    displaced = taken & (accepted.nodes != depth)
    request, column = displaced.nonzero(as_tuple=True)
    return Moves(request, accepted.nodes[request, column] + 1, column + 1)


def _node_rows(trees: DraftTrees) -> torch.Tensor:
    return torch.arange(trees.tokens.shape[0], device=trees.tokens.device) + trees.request_of_node + 1
