"""A case of a GPU check, in this process: `python -m clover_vllm.bench.gpu.child FOLDER`.

FOLDER holds spec.json, with "function", "module:name" of what to call, "seconds", after which the process ends
itself and prints where it was, "interpret", and "command", the arguments of the process that wants to know. What is
found goes to answer.json in the same folder.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from clover_vllm.base.files import write_json
from clover_vllm.bench.gpu.flash import stand_in_for_flash_attention


def main(folder: Path) -> None:
    """Run the case; failures are part of the answer."""
    spec = json.loads((folder / "spec.json").read_text())
    sys.argv = spec["command"]  # so results tell it
    faulthandler.dump_traceback_later(max(1.0, spec["seconds"] - 1), exit=True)
    answer: dict[str, Any] = {}

    def say(**found: Any) -> None:
        answer.update(found)
        write_json(folder / "answer.json", answer)

    try:
        if spec["interpret"]:
            from clover_vllm.launch.interpreter import interpret

            interpret()
        else:
            stand_in_for_flash_attention()
        module, name = spec["function"].split(":")
        getattr(importlib.import_module(module), name)(spec, say)
    except BaseException:
        say(error=traceback.format_exc())
    say(done=True)
    sys.stdout.flush()
    os._exit(0)  # an engine that hangs while it is taken apart costs nothing


if __name__ == "__main__":
    main(Path(sys.argv[1]))
