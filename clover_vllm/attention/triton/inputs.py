"""What tree attention on a GPU needs to know about a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

CAUSAL = -1
"""Ancestor bits of a row that sees all rows before it, as in plain decoding and in prompt chunks."""


@dataclass(frozen=True)
class PagedTrees:
    """What is the same for all layers of a step (made once per step; views of persistent buffers under CUDA graphs).

    A request's rows lie one behind the other, and so do their slots in the cache, behind its context. In a request
    that verifies a tree the root is the first row, and all rows have ancestor bits. Padding requests have no rows.
    """

    block_table: torch.Tensor  # int32 [R, blocks], cache blocks of each request, in order
    query_start_loc: torch.Tensor  # int32 [R + 1], first row of each request
    seq_lens: torch.Tensor  # int32 [R], tokens of each request in the cache, this step's rows included
    bits: torch.Tensor  # int64 [T or more], bit j: the request's j-th row of this step is visible; or CAUSAL
    max_rows: int  # of a request that is attended: nodes + 1, or the longest query where all rows are written

    def __post_init__(self) -> None:
        for name in ("block_table", "query_start_loc", "seq_lens"):
            assert getattr(self, name).dtype == torch.int32, f"{name} must be int32"
        assert self.bits.dtype == torch.int64, "bits must be int64"
        assert self.block_table.stride(-1) == 1, "a request's blocks must lie together"
