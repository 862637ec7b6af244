"""`clover-vllm data` in a process of its own, which tests kill; `engines.Script` starts it.

`main` takes the fields of `DataSettings`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clover_vllm.train.generate import generate
from clover_vllm.train.settings import DataSettings


def main(spec: dict[str, Any]) -> None:
    paths = {"prompts": [Path(p) for p in spec["prompts"]], "output": Path(spec["output"])}
    generate(DataSettings(**{**spec, **paths}))
