"""Hidden states are computed once per sequence that is kept, whatever stands beside it in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clover_vllm.train.batches import Batch, collate
from clover_vllm.train.hidden import HiddenStates

SIZE = 4
LENGTHS = [5, 3, 6, 4, 7, 2]


class CountingTarget:
    """Stands for a FrozenTarget: a state tells its token, and which call computed it."""

    dtype = torch.float32
    device = torch.device("cpu")
    config = SimpleNamespace(hidden_size=SIZE)

    def __init__(self) -> None:
        self.calls: list[list[int]] = []  # first tokens of the sequences that were computed
        self.last: torch.Tensor | None = None

    def hidden_states(self, token_ids: torch.Tensor, layers: Sequence[int] = ()) -> torch.Tensor:
        assert not layers
        self.calls.append(token_ids[:, 0].tolist())
        self.last = (token_ids + len(self.calls) / 100)[..., None].expand(*token_ids.shape, SIZE).clone()
        return self.last


def batch_of(*indices: int) -> Batch:
    """Sequence i is made of tokens 10 i + 1, 10 i + 2, ..."""
    pairs = [(np.arange(10 * i + 1, 10 * i + LENGTHS[i]), np.array([10 * i + LENGTHS[i]])) for i in indices]
    return collate(list(indices), pairs)


def states(target: CountingTarget, folder: Path | None, tokens: int) -> HiddenStates:
    whole: Any = target
    return HiddenStates(whole, LENGTHS, folder, tokens * SIZE * 4, key="k")


def real(hidden: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    return [hidden[row, :length] for row, length in enumerate(batch.lengths.tolist())]


def test_without_a_cache_nothing_is_copied() -> None:
    target = CountingTarget()
    assert states(target, None, 100)(batch_of(0, 4)) is target.last
    assert target.calls == [[1, 41]]


def test_a_kept_sequence_is_computed_once_whatever_stands_beside_it(tmp_path: Path) -> None:
    target = CountingTarget()
    source = states(target, tmp_path, sum(LENGTHS[:3]))
    assert source.kept == 3
    seen: dict[int, torch.Tensor] = {}
    indices: tuple[int, ...]
    for indices in ((0, 4), (1, 2), (3, 5)):
        batch = batch_of(*indices)
        seen |= dict(zip(indices, real(source(batch), batch), strict=True))
    assert target.calls == [[1], [41], [11, 21], [31, 51]]
    target.calls.clear()
    for indices in ((0, 1, 5), (2, 3, 4), (2, 0)):
        batch = batch_of(*indices)
        for index, found in zip(indices, real(source(batch), batch), strict=True):
            assert torch.equal(found.long(), seen[index].long())
            if index < 3:
                assert torch.equal(found, seen[index])
    assert target.calls == [[51], [31, 41]]


@pytest.mark.parametrize("torn", [False, True])
def test_another_run_uses_what_was_written_whole(torn: bool, tmp_path: Path) -> None:
    batch = batch_of(1, 3)
    expected = real(states(CountingTarget(), tmp_path, 1000)(batch), batch)
    if torn:  # a write that a full disk cut
        with open(tmp_path / "written.bin", "ab") as file:
            file.write(b"\1\0\0")
    second, beside = CountingTarget(), CountingTarget()
    source, other = states(second, tmp_path, 1000), states(beside, tmp_path, 1000)
    for found, wanted in zip(real(source(batch), batch), expected, strict=True):
        assert torch.equal(found, wanted)
    assert second.calls == []
    source(batch_of(0))
    other(batch_of(0, 1))  # another process of the same run
    assert beside.calls == []


def test_states_of_another_target_are_not_used(tmp_path: Path) -> None:
    states(CountingTarget(), tmp_path, 1000)(batch_of(0))
    other = CountingTarget()
    source = HiddenStates(other, LENGTHS, tmp_path, 1000 * SIZE * 4, key="another")  # type: ignore[arg-type]
    source(batch_of(0))
    assert other.calls == [[1]]
