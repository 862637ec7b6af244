"""The benchmark of speculation's own Python drafts, verifies and sleeps as an engine does."""

from __future__ import annotations

import pytest

from clover_vllm.engine.overhead import PARTS, measure


@pytest.mark.parametrize("drafts", [True, False])
def test_every_part_is_timed(drafts: bool) -> None:
    found = measure(requests=8, drafts=drafts, steps=100)
    needless = set() if drafts else {"score", "read"}
    assert all(found.parts[part] > 0 for part in PARTS if part not in needless)
    assert (found.nodes > 1) == drafts
    assert (found.accepted > 0.3) == drafts
    assert (found.catch_up > 0) != drafts
