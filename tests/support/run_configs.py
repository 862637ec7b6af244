"""Makes engine configurations in a process of its own: `python run_configs.py SPEC OUT`.

SPEC: [arguments of EngineArgs, …]; OUT: for each null, or the error's name and text.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm.engine.arg_utils import EngineArgs

    from clover_vllm.engine import plugin

    plugin.register()
    found: list[list[str] | None] = []
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        try:
            EngineArgs(**arguments).create_engine_config()
            found.append(None)
        except Exception as error:
            found.append([type(error).__name__, str(error)])
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
