"""`clover-vllm train` in a process of its own, which tests kill; `engines.Script` starts it.

`main` takes the fields of `TrainSettings`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clover_vllm.train.settings import TrainSettings
from clover_vllm.train.trainer import train


def main(spec: dict[str, Any]) -> None:
    paths = {"data": [Path(p) for p in spec["data"]], **{k: Path(spec[k]) for k in ("output", "cache")}}
    train(TrainSettings(**{**spec, **paths}))
