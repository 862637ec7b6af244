"""Hidden states of the training sequences: computed on the fly, kept on disk within a budget.

On two cores the target's forward is half of a training step, so from the second epoch on a cached
state halves the cost. A sequence's states are written when it is first seen. Which sequences may
be kept is fixed by the budget before the run, and a batch is read from disk only when all of it is
there, so a resumed run sees what an unbroken one does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import make_folder, write_json
from clover_vllm.target.frozen import FrozenTarget
from clover_vllm.train.batches import Batch

_CODES = {torch.bfloat16: np.int16, torch.float16: np.int16, torch.float32: np.int32}


class HiddenStates:
    """Source of pre-norm hidden states for batches.

    Args:
        target: computes what is not stored.
        lengths: tokens per sequence of the data set.
        folder: where to keep states, or None to keep nothing.
        budget_bytes: most bytes on disk; the first sequences that fit are kept.
        key: identifies target and data; a folder with another key is emptied first. States that
            another run of the same target and data left are used.
    """

    def __init__(
        self,
        target: FrozenTarget,
        lengths: list[int],
        folder: Path | None = None,
        budget_bytes: int = 0,
        key: str = "",
    ) -> None:
        self.target = target
        self.dtype = target.dtype
        self.size = int(target.config.hidden_size)
        self._code = _CODES[self.dtype]
        per_token = self.size * np.dtype(self._code).itemsize
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        kept = int(np.searchsorted(starts, budget_bytes // per_token, side="right")) - 1
        self.kept = kept if folder is not None else 0
        self._starts = starts
        if folder is not None and self.kept:
            self._open(folder, int(starts[self.kept]), key)

    def _open(self, folder: Path, tokens: int, key: str) -> None:
        make_folder(folder)
        meta = {"key": key, "tokens": tokens, "size": self.size, "dtype": str(self.dtype)}
        stamp = folder / "meta.json"
        data, done = folder / "states.bin", folder / "done.bin"
        if not _has_stamp(stamp, meta):
            for path in (stamp, data, done):
                path.unlink(missing_ok=True)
            with open(data, "wb") as file:
                file.truncate(tokens * self.size * np.dtype(self._code).itemsize)
            with open(done, "wb") as file:
                file.truncate(self.kept)
            write_json(stamp, meta)
        # Plain reads and writes: a memory map would count the whole file as resident.
        self._data = os.open(data, os.O_RDWR)
        self._done = np.memmap(done, dtype=np.uint8, mode="r+", shape=(self.kept,))

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Hidden states of a batch, [B, T, D] in the target's dtype on the target's device.

        A batch is read from disk only when all of it is there: bf16 results depend on how a batch
        is padded, and a resumed run must see what the unbroken one saw.
        """
        if all(i < self.kept and self._done[i] for i in batch.indices):
            return self._read(batch)
        hidden = self.target.hidden_states(batch.token_ids)
        codes = hidden.detach().cpu().contiguous().view(_torch_code(self._code)).numpy()
        for row, (i, length) in enumerate(zip(batch.indices, batch.lengths.tolist(), strict=True)):
            if i < self.kept and not self._done[i]:
                self._write(i, codes[row, :length])
        return hidden

    def _offset(self, index: int) -> int:
        return int(self._starts[index]) * self.size * np.dtype(self._code).itemsize

    def _write(self, index: int, codes: np.ndarray) -> None:
        try:
            data, at = memoryview(codes.tobytes()), self._offset(index)
            while data:
                written = os.pwrite(self._data, data, at)
                data, at = data[written:], at + written
        except OSError as error:
            raise UserError(
                f"The cache of hidden states cannot be written ({error.strerror}); "
                "make room or give a smaller --cache-gib."
            ) from error
        self._done[index] = 1

    def _read(self, batch: Batch) -> torch.Tensor:
        out = np.zeros((*batch.token_ids.shape, self.size), dtype=self._code)
        for row, (i, length) in enumerate(zip(batch.indices, batch.lengths.tolist(), strict=True)):
            count = length * self.size * out.itemsize
            raw = os.pread(self._data, count, self._offset(i))
            out[row, :length] = np.frombuffer(raw, self._code).reshape(length, self.size)
        return torch.from_numpy(out).view(self.dtype).to(self.target.device)


def _has_stamp(stamp: Path, meta: dict[str, object]) -> bool:
    try:
        return bool(json.loads(stamp.read_text()) == meta)
    except (OSError, ValueError):
        return False


def _torch_code(code: type) -> torch.dtype:
    return torch.int16 if code is np.int16 else torch.int32
