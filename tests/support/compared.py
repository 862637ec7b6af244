"""What `clover-vllm bench` wrote of plain vLLM beside Clover-2, in float32."""

from __future__ import annotations

import json
from pathlib import Path


def assert_compared(folder: Path) -> None:
    """Both were measured, Clover-2 drafted, and their texts are the same."""
    plain, clover = json.loads((folder / "bench.json").read_text())["results"]
    assert plain["acceptance_length"] == 1.0
    assert clover["nodes_per_draft"] >= 1
    assert clover["equal_to_baseline"] == 1.0
    assert clover["tokens_per_second"] > 0
