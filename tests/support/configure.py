"""Configurations as vLLM makes them before an engine starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from clover_vllm.engine import plugin


def configuration(target: Path, speculative: dict[str, Any], **more: Any) -> Any:
    plugin.register()
    args = EngineArgs(model=str(target), skip_tokenizer_init=True, speculative_config=speculative, **more)
    return args.create_engine_config()
