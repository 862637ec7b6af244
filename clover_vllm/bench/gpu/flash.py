"""vLLM's CUDA build without its FlashAttention libraries."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

PACKAGE = "vllm.vllm_flash_attn"


def flash_attention_problem() -> str | None:
    """Why vLLM's FlashAttention cannot be used here, or None."""
    import torch

    if not torch.cuda.is_available():
        return "there is no GPU"
    interface = importlib.import_module(f"{PACKAGE}.flash_attn_interface")
    if interface.FA2_AVAILABLE or interface.FA3_AVAILABLE:
        return None
    return f"{interface.FA2_UNAVAILABLE_REASON}; {interface.FA3_UNAVAILABLE_REASON}"


def stand_in_for_flash_attention() -> None:
    """Let vLLM be imported without the libraries, for its Triton attention; a second call does nothing.

    Its modules import functions from `vllm.vllm_flash_attn`, which raises without them.
    """
    found = importlib.util.find_spec("vllm")
    if PACKAGE in sys.modules or found is None:
        return
    folder = Path((found.submodule_search_locations or [""])[0]) / "vllm_flash_attn"
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    interface = importlib.import_module(f"{PACKAGE}.flash_attn_interface")
    if interface.FA2_AVAILABLE or interface.FA3_AVAILABLE:
        del sys.modules[PACKAGE]
        importlib.import_module(PACKAGE)
        return
    for name, value in vars(interface).items():
        if not name.startswith("_"):
            setattr(package, name, value)
