"""Moving rows of a paged key/value cache, for vLLM's CPU backend (layouts: see `tree_attention`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from clover_vllm.attention.cpu.tree_attention import LAYOUTS, native_library, places


class CacheRows:
    """Moves rows in many layers' caches at once."""

    def __init__(self, caches: Sequence[torch.Tensor], layout: str = "vec") -> None:
        """
        Args:
            caches: per layer, vLLM's [blocks, kv heads, block size, 2 D] tensor, all of one shape
                and with contiguous pages per block and head.
            layout: of all of them.
        """
        first = caches[0]
        assert all(cache.shape == first.shape and cache.stride() == first.stride() for cache in caches)
        assert first.stride()[2:] == (first.shape[3], 1), "pages must be contiguous"
        self._caches, self._layout = list(caches), layout
        self._pointers = (ctypes.c_uint64 * len(caches))(*(cache.data_ptr() for cache in caches))
        library = native_library()
        self._native = None
        if library is not None and first.element_size() in (2, 4):
            self._native = library.clover_move_rows
            self._native.argtypes = [
                *[ctypes.c_int] * 6,
                *[ctypes.c_int64] * 2,
                ctypes.c_void_p,
                ctypes.c_int,
                *[ctypes.c_void_p] * 2,
            ]

    def move(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy keys and values of slots to other slots, in order, in all layers.

        Args:
            sources: slots (block * block size + offset).
            destinations: slots. One may be the source of another copy only if that copy comes first.
        """
        if not sources:
            return
        if self._native is None:
            self._move_in_torch(torch.tensor(sources), torch.tensor(destinations))
            return
        cache = self._caches[0]
        failed = self._native(
            cache.element_size(),
            LAYOUTS.index(self._layout),
            len(self._caches),
            cache.shape[1],
            cache.shape[3] // 2,
            cache.shape[2],
            cache.stride(0),
            cache.stride(1),
            self._pointers,
            len(sources),
            (ctypes.c_int64 * len(sources))(*sources),
            (ctypes.c_int64 * len(sources))(*destinations),
        )
        assert not failed, "element size checked above"

    def _move_in_torch(self, sources: torch.Tensor, destinations: torch.Tensor) -> None:
        """All sources are gathered before anything is written."""
        _, _, block, double = self._caches[0].shape
        of_keys, of_values = places(self._layout, block, double // 2)
        in_page = torch.cat((of_keys, of_values + block * double // 2), dim=1)  # [block, 2 D]
        a, b = sources // block, destinations // block
        old, new = in_page[sources % block], in_page[destinations % block]
        for cache in self._caches:
            pages = cache.flatten(2)
            moved = torch.stack([pages[block_of, :, at] for block_of, at in zip(a, old, strict=True)])
            for block_of, at, row in zip(b, new, moved, strict=True):
                pages[block_of, :, at] = row
