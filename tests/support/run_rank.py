"""One rank of several, forked: `engines.Script` starts it with the variables that torchrun would set.

`main` takes {"arguments": of `clover-vllm`}, or {"agree": folder} for `agree`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)  # as torchrun does
    if "agree" in spec:
        agree(Path(spec["agree"]))
        return
    from clover_vllm.cli import main as run

    sys.argv = ["clover-vllm", *spec["arguments"]]
    try:
        run()
    except SystemExit as end:
        if end.code:
            raise


def agree(folder: Path) -> None:
    """Print the checkpoint that both ranks resume from, and save another, which rank 1 writes slowly."""
    from accelerate import PartialState

    from clover_vllm.train.settings import TrainSettings
    from clover_vllm.train.trainer import _Checkpoints, agreed_checkpoint

    PartialState(cpu=True)
    rank = int(os.environ["RANK"])
    agreed = agreed_checkpoint(folder / f"host{rank}")
    assert agreed is not None
    print("AGREED", agreed.name, flush=True)
    made = folder / "checkpoint-12"
    if rank == 1:
        time.sleep(1)
        assert not (made / "complete").exists()
    made.mkdir(exist_ok=True)
    (made / f"rng_state_{rank}.pth").touch()
    head: Any = SimpleNamespace(save=lambda *_: None)
    callbacks: Any = _Checkpoints(TrainSettings("", [], folder), head)
    state = SimpleNamespace(global_step=12, is_world_process_zero=rank == 0, log_history=[])
    callbacks.on_save(SimpleNamespace(output_dir=folder), state, None)
    torch.distributed.destroy_process_group()
