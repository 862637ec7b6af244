"""Hidden states of the training sequences: computed on the fly, kept on disk within a budget.

On two cores the target's forward is half of a training step, so from the second epoch on a cached
state halves the cost. Which sequences may be kept is fixed by the budget before the run; their
states are written when they are first seen and read from then on, whatever stands beside them in a
batch.

bfloat16 results depend on how a batch is padded, and a resumed run must see what an unbroken one
saw. So the sequences that may be kept and the others are computed apart, and the kept ones of a
batch are marked as written by one system call.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
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
        layers: of the target whose inputs are wanted too (see `FrozenTarget.hidden_states`).
    """

    def __init__(
        self,
        target: FrozenTarget,
        lengths: list[int],
        folder: Path | None = None,
        budget_bytes: int = 0,
        key: str = "",
        layers: Sequence[int] = (),
    ) -> None:
        self.target = target
        self.dtype = target.dtype
        self.layers = list(layers)
        self.size = int(target.config.hidden_size) * (1 + len(self.layers))
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
        meta = {
            "key": key,
            "tokens": tokens,
            "size": self.size,
            "dtype": str(self.dtype),
            "layers": self.layers,
        }
        stamp = folder / "meta.json"
        data, written = folder / "states.bin", folder / "written.bin"
        if not _has_stamp(stamp, meta):
            for path in (stamp, data, written):
                path.unlink(missing_ok=True)
            with open(data, "wb") as file:
                file.truncate(tokens * self.size * np.dtype(self._code).itemsize)
            write_json(stamp, meta)
        # Plain reads and writes: a memory map would count the whole file as resident.
        self._data = os.open(data, os.O_RDWR)
        self._journal = os.open(written, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        os.ftruncate(self._journal, os.fstat(self._journal).st_size // 8 * 8)  # a full disk cuts a write
        self._journal_read = 0
        self._written = np.zeros(self.kept, dtype=bool)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Hidden states of a batch, [B, T, D] in the target's dtype on the target's device.

        Raises:
            UserError: the cache cannot be written.
        """
        keep = [row for row, i in enumerate(batch.indices) if i < self.kept]
        if not keep:
            return self.target.hidden_states(batch.token_ids, self.layers)
        self._read_journal()
        stored = [row for row in keep if self._written[batch.indices[row]]]
        missing = [row for row in keep if not self._written[batch.indices[row]]]
        others = [row for row, i in enumerate(batch.indices) if i >= self.kept]
        out = torch.zeros(*batch.token_ids.shape, self.size, dtype=self.dtype, device=self.target.device)
        for rows in (missing, others):
            if rows:
                width = int(batch.lengths[rows].max())
                out[rows, :width] = self.target.hidden_states(batch.token_ids[rows, :width], self.layers)
        if missing:
            self._write(batch, missing, out)
        for row in stored:
            out[row, : int(batch.lengths[row])] = self._read(batch.indices[row])
        return out

    def _extent(self, index: int) -> tuple[int, int]:
        """Where a sequence lies in the data file: first byte, bytes."""
        first, end = self._starts[index : index + 2] * (self.size * np.dtype(self._code).itemsize)
        return int(first), int(end - first)

    def _write(self, batch: Batch, rows: list[int], hidden: torch.Tensor) -> None:
        code = torch.int16 if self._code is np.int16 else torch.int32
        try:
            for row in rows:
                states = hidden[row, : int(batch.lengths[row])].detach().cpu().contiguous()
                data = memoryview(states.view(code).numpy().tobytes())
                at, _ = self._extent(batch.indices[row])
                while data:
                    count = os.pwrite(self._data, data, at)
                    data, at = data[count:], at + count
            # One append, so that a kill marks all sequences of a batch or none.
            os.write(self._journal, np.array([batch.indices[row] for row in rows], np.int64).tobytes())
        except OSError as error:
            raise UserError(
                f"The cache of hidden states cannot be written ({error.strerror}); "
                "make room or give a smaller --cache-gib."
            ) from error

    def _read_journal(self) -> None:
        """Learn what was written since the last call, by this process or by others of this machine."""
        while raw := os.pread(self._journal, 1 << 20, self._journal_read):
            whole = len(raw) // 8 * 8
            if not whole:
                return
            self._written[np.frombuffer(raw[:whole], np.int64)] = True
            self._journal_read += whole

    def _read(self, index: int) -> torch.Tensor:
        """[T, D] of a sequence that was written."""
        at, count = self._extent(index)
        raw = np.frombuffer(os.pread(self._data, count, at), self._code).reshape(-1, self.size)
        return torch.from_numpy(raw.copy()).view(self.dtype).to(self.target.device)


def _has_stamp(stamp: Path, meta: dict[str, object]) -> bool:
    try:
        return bool(json.loads(stamp.read_text()) == meta)
    except (OSError, ValueError):
        return False
