"""Entry point of vLLM's plugin group `vllm.general_plugins`."""

from __future__ import annotations

import logging

from clover_vllm.engine import hooks, seams

logger = logging.getLogger(__name__)


def register() -> None:
    """Make vLLM know the method clover2; harmless if called again.

    vLLM calls this in each of its processes (API server, engine core, workers, model inspection).
    On an unsupported vLLM nothing is registered, and asking for clover2 says why. Nothing is
    raised, since an exception would end vLLM without Clover too.
    """
    try:
        _register()
    except Exception:
        logger.exception("clover-vllm stays inactive:")


def _register() -> None:
    import vllm

    problems = seams.complaints(vllm.__version__)
    try:
        from vllm.engine.arg_utils import EngineArgs
    except ImportError:
        logger.warning("clover-vllm stays inactive: %s.", "; ".join(problems))
        return
    hooks.install(EngineArgs, problems)
    if problems:
        logger.warning("clover-vllm stays inactive: %s.", "; ".join(problems))
        return
    from transformers import AutoConfig
    from vllm import ModelRegistry, SamplingParams
    from vllm.config import VllmConfig

    from clover_vllm.engine.models import ARCHITECTURES
    from clover_vllm.heads.registry import TREE_HEADS

    hooks.install_sampling(SamplingParams)
    hooks.install_lookahead(VllmConfig)
    hooks.install_async_scheduling()
    for model_type, kind in TREE_HEADS.items():
        AutoConfig.register(model_type, kind.config_class(), exist_ok=True)
    for name in ARCHITECTURES.keys() - ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, ARCHITECTURES[name])
