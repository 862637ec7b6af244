"""Where the functions on head folders are found by those who serve: see `weights` and `clover2.checkpoint`."""

from clover_vllm.heads.clover2.checkpoint import check_head, clover2_config, load_head, save_head
from clover_vllm.heads.weights import (
    PROBED_ROWS,
    check_probe,
    check_target,
    check_target_folder,
    is_finite,
    probe_lm_head,
    read_config,
)

__all__ = [
    "PROBED_ROWS",
    "check_head",
    "check_probe",
    "check_target",
    "check_target_folder",
    "clover2_config",
    "is_finite",
    "load_head",
    "probe_lm_head",
    "read_config",
    "save_head",
]
