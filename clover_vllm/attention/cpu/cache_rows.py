"""Moving rows of a paged key/value cache, for vLLM's CPU backend ("vec" layout, see `tree_attention`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from clover_vllm.attention.cpu.tree_attention import native_library


class CacheRows:
    """Moves rows in many layers' caches at once."""

    def __init__(self, caches: Sequence[torch.Tensor]) -> None:
        """
        Args:
            caches: per layer, vLLM's [blocks, kv heads, block size, 2 D] tensor, all of one shape
                and with contiguous pages per block and head.
        """
        first = caches[0]
        assert all(cache.shape == first.shape and cache.stride() == first.stride() for cache in caches)
        assert first.stride()[2:] == (first.shape[3], 1), "pages must be contiguous"
        self._caches = list(caches)
        self._pointers = (ctypes.c_uint64 * len(caches))(*(cache.data_ptr() for cache in caches))
        library = native_library()
        self._native = None
        if library is not None and first.element_size() in (2, 4):
            self._native = library.clover_move_rows
            self._native.argtypes = [
                *[ctypes.c_int] * 5,
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
        for cache in self._caches:
            blocks, heads, block, double = cache.shape
            pages = cache.view(blocks, heads, 2, block * double // 2)
            keys = pages[:, :, 0].unflatten(-1, (double // 2, block))
            values = pages[:, :, 1].unflatten(-1, (block, double // 2))
            a, b = sources // block, sources % block
            moved_keys, moved_values = keys[a, :, :, b], values[a, :, b]
            a, b = destinations // block, destinations % block
            keys[a, :, :, b] = moved_keys
            values[a, :, b] = moved_values
