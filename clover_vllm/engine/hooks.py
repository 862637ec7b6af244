"""Everything that Clover touches in vLLM beyond its official extension points.

Official ones: the entry point `vllm.general_plugins`, `ModelRegistry.register_model`, transformers'
`AutoConfig.register`, `ParallelConfig.worker_cls`, and `register_backend` for attention.

`HOOKS` lists what is replaced at run time; `RELIED_ON` what our worker, runner and proposer override
or call in vLLM's classes and what therefore must look as expected. Both are read from vLLM's source
files, so that the check imports no more of vLLM than the packages that they are in.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from clover_vllm.base.errors import UserError
from clover_vllm.engine.options import METHOD, asks_for_clover

SUPPORTED_VLLM = ("0.32.0",)


@dataclass(frozen=True)
class Symbol:
    """A function of vLLM and the arguments that we expect it to take."""

    module: str
    name: str  # a function, or Class.method
    arguments: tuple[str, ...]  # in order; further ones may follow
    why: str


HOOKS = (
    Symbol(
        "vllm.engine.arg_utils",
        "EngineArgs.create_speculative_config",
        ("self", "target_model_config", "target_parallel_config"),
        "SpeculativeConfig.method is a closed list. For clover2 the hook returns "
        "engine.config.CloverSpeculativeConfig, a subclass; anything else goes to the original.",
    ),
    Symbol(
        "vllm.v1.attention.selector",
        "_cached_get_attn_backend",
        ("backend", "attn_selector_config", "num_heads"),
        "Its cache is emptied when a Clover worker registers its attention backend, because a process "
        "may have built an engine without Clover before.",
    ),
    Symbol(
        "vllm.sampling_params",
        "SamplingParams._validate_spec_decode",
        ("self", "speculative_config"),
        "vLLM refuses min_p and logit_bias with any speculation. With clover2 each token is an ordinary "
        "sampling step, so the hook lets them pass.",
    ),
    Symbol(
        "vllm.config.vllm",
        "VllmConfig.__post_init__",
        ("self",),
        "It schedules a step ahead for the methods in EagleModelTypes, a closed list, and the hook adds clover2 there. "
        "That needs the V2 model runner; with V1, drafts wait for the host.",
    ),
    Symbol(
        "vllm.v1.sample.logits_processor",
        "build_logitsprocs",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model", "custom_logitsprocs"),
        "For the same reason Clover's workers build all logits processors, the user's own too; the "
        "function is replaced in vllm.v1.worker.gpu_model_runner, and only there.",
    ),
    Symbol(
        "vllm.config.vllm",
        "VllmConfig.num_lookahead_tokens",
        ("self",),
        "vLLM reserves a cache slot per draft token beyond the step, because an EAGLE head writes there. "
        "Clover's head writes accepted rows only, which have slots, so the hook says 0.",
    ),
    Symbol(
        "vllm.v1.worker.cpu_model_runner",
        "CPUModelRunner.__init__",
        ("self", "vllm_config", "device"),
        "CPUWorker.init_device makes its runner by name, where the GPU worker has a method to override. While a "
        "Clover worker runs it, the name in vllm.v1.worker.cpu_worker is that of Clover's runner; a second "
        "runner made afterwards would make proposers and users' logits processors twice.",
    ),
    Symbol(
        "vllm.v1.worker.gpu.spec_decode",
        "init_speculator",
        ("vllm_config", "device", "req_states"),
        "The V2 runner makes its speculator by a closed list of methods. While Clover's runner is constructed, the name in "
        "vllm.v1.worker.gpu.model_runner is that of Clover's; a second speculator would be made for nothing otherwise.",
    ),
    Symbol(
        "vllm.v1.worker.gpu.cudagraph_utils",
        "ModelCudaGraphManager.__init__",
        ("self", "vllm_config", "device", "cudagraph_mode", "decode_query_len"),
        "The V2 runner makes it by name, for trees of one size. While Clover's runner gets its cache, the name in "
        "vllm.v1.worker.gpu.model_runner is that of a subclass, for trees of several.",
    ),
    Symbol(
        "vllm.v1.worker.cpu.model_runner",
        "CPUModelRunner.warming_up_model",
        ("self",),
        "As CPUModelRunner of V1: CPUWorker.init_device makes its V2 runner by name too. Only where Triton is interpreted.",
    ),
)

_RUNNER = "vllm.v1.worker.gpu_model_runner"
_ON_V1 = (
    Symbol(
        _RUNNER,
        "GPUModelRunner._prepare_inputs",
        ("self", "scheduler_output", "num_scheduled_tokens"),
        "tree positions",
    ),
    Symbol(
        _RUNNER,
        "GPUModelRunner._bookkeeping_sync",
        ("self", "scheduler_output", "sampler_output", "logits", "hidden_states", "num_scheduled_tokens"),
        "seeded requests prefilled in chunks",
    ),
    Symbol(_RUNNER, "GPUModelRunner._input_fits_in_drafter", ("self", "common_attn_metadata"), "per request"),
    Symbol(
        _RUNNER,
        "GPUModelRunner.propose_draft_token_ids",
        (
            "self",
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
            "common_attn_metadata",
            "slot_mappings",
        ),
        "drafting",
    ),
    Symbol(
        "vllm.v1.sample.rejection_sampler",
        "RejectionSampler.forward",
        ("self", "metadata", "draft_probs", "logits", "sampling_metadata"),
        "replaced by engine.scorer.TreeScorer, an object of the runner",
    ),
    Symbol(
        "vllm.v1.sample.sampler",
        "Sampler.forward",
        ("self", "logits", "sampling_metadata", "predict_bonus_token"),
        "the target's own sampling step",
    ),
    Symbol(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        "tree masks",
    ),
    Symbol(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackendImpl.forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        "tree attention",
    ),
    Symbol(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer.load_model",
        ("self", "target_model"),
        "shares the target's lm_head",
    ),
    Symbol(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer.build_per_group_and_layer_attn_metadata",
        ("self", "common_attn_metadata"),
        "attention of the augmenting layers",
    ),
    Symbol("vllm.v1.worker.cpu_worker", "CPUWorker.init_device", ("self",), "brings our runner"),
    Symbol("vllm.v1.worker.gpu_worker", "Worker._make_model_runner", ("self",), "brings our runner"),
    Symbol(_RUNNER, "GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata"), "KV moves"),
    Symbol(_RUNNER, "GPUModelRunner.execute_model", ("self", "scheduler_output"), "timing"),
    Symbol(_RUNNER, "GPUModelRunner.sample_tokens", ("self", "grammar_output"), "timing"),
    Symbol(
        _RUNNER, "GPUModelRunner.take_draft_token_ids", ("self",), "drafts when the engine asks for drafts"
    ),
    Symbol(_RUNNER, "GPUModelRunner._dummy_run", ("self", "num_tokens"), "measures what steps cost"),
    Symbol(
        "vllm.v1.worker.cpu_worker",
        "CPUWorker.compile_or_warm_up_model",
        ("self",),
        "measures what steps cost before the first request",
    ),
    Symbol(_RUNNER, "GPUModelRunner.initialize_kv_cache", ("self", "kv_cache_config"), "finds the layers"),
    Symbol(_RUNNER, "GPUModelRunner._attn_group_iterator", ("self",), "finds the metadata builders"),
    Symbol(
        "vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer._get_model", ("self",), "the head"
    ),
    Symbol(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer._get_slot_mapping",
        ("self", "num_tokens", "slot_mapping"),
        "the head's cache",
    ),
    Symbol(
        "vllm.v1.spec_decode.llm_base_proposer",
        "SpecDecodeBaseProposer.dummy_run",
        ("self", "num_tokens"),
        "compiling the head",
    ),
    Symbol(
        "vllm._custom_ops",
        "cpu_attn_get_scheduler_metadata",
        ("num_reqs", "num_heads", "num_kv_heads", "head_dim", "seq_lens", "dtype", "query_start_loc"),
        "long prompt chunks beside trees",
    ),
    Symbol("vllm._custom_ops", "rms_norm", ("out", "input", "weight", "epsilon"), "the head's norms"),
    Symbol(
        "vllm._custom_ops",
        "create_onednn_scaled_mm",
        ("weight", "weight_scales", "output_type", "dynamic_quant", "use_azp"),
        "the head's int8 products",
    ),
    Symbol(
        "vllm._custom_ops",
        "onednn_scaled_mm",
        ("dnnl_handler", "x", "output", "input_scale", "input_zp", "input_zp_adj", "bias"),
        "the head's int8 products",
    ),
    Symbol("vllm._custom_ops", "onednn_scaled_int8_quant", ("input",), "the head's int8 products"),
    Symbol(
        "vllm.config.speculative",
        "SpeculativeConfig._verify_and_get_draft_tp",
        ("target_parallel_config", "speculative_draft_tensor_parallel_size", "draft_hf_config"),
        "ranks of the head",
    ),
    Symbol(
        "vllm.config.speculative",
        "SpeculativeConfig.create_draft_parallel_config",
        ("target_parallel_config", "speculative_draft_tensor_parallel_size"),
        "ranks of the head",
    ),
    Symbol("vllm.compilation.backends", "set_model_tag", ("tag",), "compiling the head"),
    Symbol(
        "vllm.model_executor.layers.utils",
        "dispatch_cpu_unquantized_gemm",
        ("layer", "remove_weight"),
        "the head's rows of the lm_head",
    ),
)


_V2 = "vllm.v1.worker.gpu"
_V2_RUNNER = f"{_V2}.model_runner"
_SPECULATOR = f"{_V2}.spec_decode.speculator"
_VERIFIER = f"{_V2}.spec_decode.rejection_sampler"
_ON_V2 = (
    Symbol(_V2_RUNNER, "GPUModelRunner.__init__", ("self", "vllm_config", "device"), "makes our speculator"),
    Symbol(_V2_RUNNER, "GPUModelRunner.load_model", ("self", "load_dummy_weights"), "brings our scorer"),
    Symbol(
        _V2_RUNNER,
        "GPUModelRunner.initialize_kv_cache",
        ("self", "kv_cache_config", "is_profiling"),
        "finds the layers",
    ),
    Symbol(_V2_RUNNER, "GPUModelRunner.add_requests", ("self", "scheduler_output"), "who takes chains"),
    Symbol(_V2_RUNNER, "GPUModelRunner.prepare_attn", ("self", "input_batch"), "tree positions and masks"),
    Symbol(
        _V2_RUNNER, "GPUModelRunner.prepare_dummy_attn", ("self", "input_batch"), "no trees in dummy steps"
    ),
    Symbol(
        _V2_RUNNER,
        "GPUModelRunner.sample",
        ("self", "hidden_states", "input_batch", "grammar_output"),
        "KV moves",
    ),
    Symbol(
        f"{_V2}.sample.sampler",
        "Sampler.sample",
        (
            "self",
            "logits",
            "expanded_idx_mapping",
            "idx_mapping",
            "idx_mapping_np",
            "pos",
            "input_ids",
            "expanded_local_pos",
            "seq_lens_upper_bound_np",
            "return_logprobs",
        ),
        "the target's own sampling step, on every row",
    ),
    Symbol(
        _VERIFIER,
        "RejectionSampler.__call__",
        ("self", "logits", "input_batch", "draft_logits", "invalid_drafts"),
        "replaced by engine.v2.scorer.DeviceScorer, a subclass",
    ),
    Symbol(
        _VERIFIER,
        "RejectionSampler._verify_in_chunks",
        (
            "self",
            "logits",
            "input_batch",
            "draft_logits",
            "draft_sampled",
            "pos",
            "max_chunk_logits",
            "max_num_logprobs",
        ),
        "bounds the sampler's memory",
    ),
    Symbol(
        _VERIFIER,
        "RejectionSampler._verify",
        (
            "self",
            "logits",
            "draft_logits",
            "draft_sampled",
            "pos",
            "cu_num_logits",
            "idx_mapping",
            "idx_mapping_np",
            "expanded_idx_mapping",
            "expanded_local_pos",
            "seq_lens_upper_bound_np",
            "verify_draft_sampled",
        ),
        "the walk",
    ),
    Symbol(
        _VERIFIER,
        "RejectionSampler._get_logprobs_tensors",
        (
            "self",
            "sampled",
            "num_sampled",
            "logits",
            "cu_num_logits",
            "cu_num_logits_np",
            "max_num_logprobs",
        ),
        "logprobs along the path",
    ),
    Symbol(
        f"{_V2}.input_batch",
        "get_num_sampled_and_rejected",
        ("num_sampled", "seq_lens", "cu_num_logits", "idx_mapping", "prefill_len"),
        "prompts that go on emit nothing",
    ),
    Symbol(
        _SPECULATOR,
        "DraftModelSpeculator.load_draft_model",
        ("self", "target_model", "target_attn_layer_names"),
        "the head",
    ),
    Symbol(
        _SPECULATOR,
        "DraftModelSpeculator._build_attn_metadata",
        ("self", "num_reqs", "batch_desc", "query_start_loc_np", "seq_lens_cpu_upper_bound", "step"),
        "attention of the augmenting layers",
    ),
    Symbol(
        f"{_V2}.cudagraph_utils",
        "CudaGraphManager.capture",
        ("self", "create_forward_fn", "progress_bar_desc"),
        "CUDA graphs of drafting",
    ),
    Symbol(f"{_V2}.cudagraph_utils", "CudaGraphManager._init_candidates", ("self",), "which of them"),
    Symbol(
        f"{_V2}.cudagraph_utils",
        "CudaGraphManager.dispatch",
        ("self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"),
        "CUDA graphs of steps with trees of several sizes",
    ),
    Symbol("vllm.v1.core.sched.scheduler", "Scheduler.schedule", ("self",), "times steps"),
    Symbol(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        "times steps, counts what they accept",
    ),
    Symbol(f"{_V2}.cudagraph_utils", "CudaGraphManager.run_fullgraph", ("self", "desc"), "their replay"),
    Symbol(
        _SPECULATOR,
        "BaseSpeculator.propose",
        (
            "self",
            "input_batch",
            "attn_metadata",
            "slot_mappings",
            "last_hidden_states",
            "aux_hidden_states",
            "num_sampled",
            "num_rejected",
            "last_sampled",
            "next_prefill_tokens",
        ),
        "drafting",
    ),
    *(
        Symbol(
            f"vllm.v1.attention.backends.{module}",
            f"{name}.{method}",
            arguments,
            "tree attention",
        )
        for module, name, method, arguments in (
            (
                "triton_attn",
                "TritonAttentionMetadataBuilder",
                "build",
                ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
            ),
            (
                "flash_attn",
                "FlashAttentionMetadataBuilder",
                "build",
                ("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
            ),
            (
                "triton_attn",
                "TritonAttentionImpl",
                "forward",
                ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
            ),
            (
                "flash_attn",
                "FlashAttentionImpl",
                "forward",
                ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
            ),
        )
    ),
)
RELIED_ON = (*_ON_V1, *_ON_V2)


def complaints(version: str) -> list[str]:
    """What in the installed vLLM is not as this release of Clover expects.

    Args:
        version: `vllm.__version__`.
    """
    found = []
    if version.split("+")[0] not in SUPPORTED_VLLM:
        found.append(f"vLLM is {version}")
    for symbol in (*HOOKS, *RELIED_ON):
        arguments = _arguments(symbol.module, symbol.name)
        if arguments is None:
            found.append(f"{symbol.module}.{symbol.name} does not exist")
        elif arguments[: len(symbol.arguments)] != symbol.arguments:
            found.append(f"{symbol.module}.{symbol.name} takes other arguments")
    return found


@cache
def _functions(module: str) -> dict[str, tuple[str, ...]]:
    """Functions and methods of a module's source file, with their positional arguments."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return {}
    if spec is None or spec.origin is None:
        return {}
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found: dict[str, tuple[str, ...]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = _names(node)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    found[f"{node.name}.{member.name}"] = _names(member)
    return found


def _names(function: ast.FunctionDef) -> tuple[str, ...]:
    return tuple(argument.arg for argument in function.args.args)


def _arguments(module: str, name: str) -> tuple[str, ...] | None:
    return _functions(module).get(name)


def install(engine_args: type, problems: list[str]) -> None:
    """Make `EngineArgs.create_speculative_config` know clover2; a second call does nothing.

    A vLLM with our patches (see `patches/`) has a place for that, and is not hooked.

    Args:
        engine_args: `vllm.engine.arg_utils.EngineArgs`.
        problems: from `complaints`. If there are any, asking for clover2 raises them.
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

    Where drafts are verified, vLLM's V2 runner leaves out the logprobs of `logprob_token_ids`: such requests are refused.

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
        elif getattr(self, "logprob_token_ids", None) and not speculative_config.disable_padded_drafter_batch:
            from clover_vllm.engine.support import refuse  # of vLLM's own classes: not for any version

            raise ValueError(str(refuse("requests with logprob_token_ids on vLLM's V2 model runner")))

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
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
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
    with _replaced(cpu_worker, "CPUModelRunner", runner):
        yield


@contextmanager
def making_speculator(speculator: type) -> Iterator[None]:
    """Let vLLM's V2 runner make this speculator in its constructor; for our runner."""
    from vllm.v1.worker.gpu import model_runner

    with _replaced(model_runner, "init_speculator", lambda config, device, *_: speculator(config, device)):
        yield


@contextmanager
def making_graphs(manager: Callable[..., Any]) -> Iterator[None]:
    """Let vLLM's V2 runner make its CUDA graphs by this; for our runner."""
    from vllm.v1.worker.gpu import model_runner

    with _replaced(model_runner, "ModelCudaGraphManager", manager):
        yield


@contextmanager
def making_v2_runner(runner: type) -> Iterator[None]:
    """Let `CPUWorker.init_device` make this class of V2 runner; for our worker."""
    from vllm.v1.worker.cpu import model_runner

    with _replaced(model_runner, "CPUModelRunner", runner):
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
        problems: from `complaints`.

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
