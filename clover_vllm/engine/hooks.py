"""What Clover replaces in vLLM at run time; `engine.seams` lists it all, with the reasons."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

from clover_vllm.base.errors import UserError
from clover_vllm.engine.options import METHOD, asks_for_clover
from clover_vllm.engine.seams import SUPPORTED_VLLM


def install(engine_args: type, problems: list[str]) -> None:
    """Make `EngineArgs.create_speculative_config` know clover2; a second call does nothing.

    A vLLM with our patches (see `patches/`) has a place for that, and is not hooked.

    Args:
        engine_args: `vllm.engine.arg_utils.EngineArgs`.
        problems: from `seams.complaints`. If there are any, asking for clover2 raises them.
    """
    register = getattr(_speculative_module(), "register_speculative_config_factory", None)
    if register is not None:
        register(functools.partial(speculative_config, problems=problems) if problems else speculative_config)
        return
    original: Callable[..., Any] | None = getattr(engine_args, "create_speculative_config", None)
    if original is None or hasattr(original, "clover_original"):
        return

    @functools.wraps(original)
    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        made = speculative_config(_given(self), target_model_config, target_parallel_config, self, problems)
        return original(self, target_model_config, target_parallel_config) if made is None else made

    create_speculative_config.clover_original = original  # type: ignore[attr-defined]
    engine_args.create_speculative_config = create_speculative_config  # type: ignore[attr-defined]


def _speculative_module() -> Any:
    """`vllm.config.speculative`, or None on a vLLM that has moved it."""
    try:
        return importlib.import_module("vllm.config.speculative")
    except ImportError:
        return None


def samples_every_token(spec: Any) -> bool:
    """Whether a speculative configuration is of a method whose tokens are ordinary sampling steps."""
    says: Callable[[], bool] | None = getattr(spec, "samples_every_token", None)
    return says is not None and says()


def _knows_sampling_methods() -> bool:
    """Whether this vLLM has our patch that asks a method for `samples_every_token`."""
    return hasattr(getattr(_speculative_module(), "SpeculativeConfig", None), "samples_every_token")


def install_sampling(sampling_params: type) -> None:
    """Let min_p and logit_bias pass `SamplingParams.verify` with clover2; a second call does nothing.

    Args:
        sampling_params: `vllm.SamplingParams`.
    """
    original: Callable[..., None] = sampling_params._validate_spec_decode  # type: ignore[attr-defined]
    if _knows_sampling_methods() or hasattr(original, "clover_original"):
        return

    @functools.wraps(original)
    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if not samples_every_token(speculative_config):
            original(self, speculative_config)

    _validate_spec_decode.clover_original = original  # type: ignore[attr-defined]
    sampling_params._validate_spec_decode = _validate_spec_decode  # type: ignore[attr-defined]


def install_lookahead(vllm_config: type) -> None:
    """Reserve no cache slots beyond a step with clover2; a second call does nothing.

    Args:
        vllm_config: `vllm.config.VllmConfig`.
    """
    name = "writes_accepted_rows_only"  # asked by a vLLM with our patches
    original: Callable[[Any], int] = vllm_config.num_lookahead_tokens.fget  # type: ignore[attr-defined]
    if hasattr(getattr(_speculative_module(), "SpeculativeConfig", None), name) or hasattr(
        original, "clover_original"
    ):
        return

    @functools.wraps(original)
    def num_lookahead_tokens(self: Any) -> int:
        says: Callable[[], bool] | None = getattr(self.speculative_config, name, None)
        return 0 if says is not None and says() else original(self)

    num_lookahead_tokens.clover_original = original  # type: ignore[attr-defined]
    vllm_config.num_lookahead_tokens = property(num_lookahead_tokens)  # type: ignore[attr-defined]


def install_logits_processors() -> None:
    """Let runners made from now on build all logits processors with clover2; for our workers."""
    from vllm.v1.worker import gpu_model_runner

    original: Callable[..., Any] = gpu_model_runner.build_logitsprocs
    if _knows_sampling_methods() or hasattr(original, "clover_original"):
        return

    @functools.wraps(original)
    def build_logitsprocs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if samples_every_token(vllm_config.speculative_config):
            vllm_config = copy.copy(vllm_config)
            vllm_config.speculative_config = None
        return original(vllm_config, *args, **kwargs)

    build_logitsprocs.clover_original = original  # type: ignore[attr-defined]
    gpu_model_runner.build_logitsprocs = build_logitsprocs


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute for the length of the context."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def making_runner(runner: type) -> Iterator[None]:
    """Let `CPUWorker.init_device` make this class of runner; for our worker.

    A vLLM with our patches asks the worker's `_make_model_runner`, and nothing is replaced.
    """
    from vllm.v1.worker import cpu_worker

    if "_make_model_runner" in vars(cpu_worker.CPUWorker):
        yield
        return
    with replaced(cpu_worker, "CPUModelRunner", runner):
        yield


@contextmanager
def making_speculator(speculator: type) -> Iterator[None]:
    """Let vLLM's V2 runner make this speculator in its constructor; for our runner."""
    from vllm.v1.worker.gpu import model_runner

    with replaced(model_runner, "init_speculator", lambda config, device, *_: speculator(config, device)):
        yield


@contextmanager
def making_graphs(manager: Callable[..., Any]) -> Iterator[None]:
    """Let vLLM's V2 runner make its CUDA graphs by this; for our runner."""
    from vllm.v1.worker.gpu import model_runner

    with replaced(model_runner, "ModelCudaGraphManager", manager):
        yield


@contextmanager
def making_v2_runner(runner: type) -> Iterator[None]:
    """Let `CPUWorker.init_device` make this class of V2 runner; for our worker."""
    from vllm.v1.worker.cpu import model_runner

    with replaced(model_runner, "CPUModelRunner", runner):
        yield


def install_async_scheduling() -> None:
    """Let vLLM schedule a step of clover2 while the one before it runs, as with EAGLE; a second call does nothing."""
    from vllm.config import vllm as module

    known = get_args(module.EagleModelTypes)
    if METHOD not in known:
        module.EagleModelTypes = Literal[*known, METHOD]


def speculative_config(
    given: dict[str, Any], target: Any, parallel: Any, engine_args: Any, problems: Sequence[str] = ()
) -> Any:
    """Clover's SpeculativeConfig, or None for another method.

    Args:
        given: a speculative configuration as the user wrote it.
        target: ModelConfig of the target.
        parallel: its ParallelConfig.
        engine_args: the EngineArgs that it all comes from.
        problems: from `seams.complaints`.

    Raises:
        UserError: clover2 is meant, and there are problems, or it is configured wrongly.
    """
    if not asks_for_clover(given):
        return None
    if problems:
        raise UserError(
            f"Clover-2 cannot run on this vLLM ({'; '.join(problems)}); "
            f"it works with vLLM {', '.join(SUPPORTED_VLLM)}."
        )
    from vllm.platforms import current_platform

    from clover_vllm.engine.config import clover_config  # of vLLM's own classes: not for any version

    return clover_config(
        given,
        target,
        parallel,
        current_platform.device_type,
        engine_args,
    )


def forget_cached_backends() -> None:
    """Empty the cache of selected backends, so that a backend registered just now is found."""
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()


def _given(engine_args: Any) -> dict[str, Any]:
    """The speculative configuration of an EngineArgs, flags such as --spec-model included."""
    given = {k.replace("-", "_"): v for k, v in (engine_args.speculative_config or {}).items()}
    for key, flag in (
        ("method", "spec_method"),
        ("model", "spec_model"),
        ("num_speculative_tokens", "spec_tokens"),
    ):
        value = getattr(engine_args, flag, None)
        if value is None:
            continue
        if key in given:
            raise ValueError(
                f"--{flag.replace('_', '-')} and --speculative-config['{key}'] are mutually exclusive"
            )
        given[key] = value
    return given
