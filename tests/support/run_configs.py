"""Makes engine configurations in a process of its own; `engines.run_script` starts it.

`main` takes [arguments of EngineArgs, …] and returns for each None, or the error's name and text.
"""

from __future__ import annotations

from typing import Any


def main(asked: list[dict[str, Any]]) -> list[list[str] | None]:
    from vllm.engine.arg_utils import EngineArgs

    from clover_vllm.engine import plugin

    plugin.register()
    found: list[list[str] | None] = []
    for arguments in asked:
        try:
            EngineArgs(**arguments).create_engine_config()
            found.append(None)
        except Exception as error:
            found.append([type(error).__name__, str(error)])
    return found
