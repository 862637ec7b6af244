"""Everything of vLLM that Clover touches beyond its official extension points, and whether the installed one has it.

Official ones: the entry point `vllm.general_plugins`, `ModelRegistry.register_model`, transformers'
`AutoConfig.register`, `ParallelConfig.worker_cls`, and `register_backend` for attention.

`HOOKS` lists what `engine.hooks` replaces at run time; `RELIED_ON` what our worker, runner and proposer override
or call in vLLM's classes and what therefore must look as expected. Both are read from vLLM's source
files, so that the check imports nothing of vLLM.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SUPPORTED_VLLM = ("0.32.0",)


@dataclass(frozen=True)
class Symbol:
    """A name of vLLM, and the arguments that we expect it to take if it is a function."""

    module: str
    name: str  # of a function, a class, what a module assigns or imports, or Class.member
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
        "vllm.v1.sample.thinking_budget_state",
        "ThinkingBudgetStateHolder.sync_batch",
        ("self", "batch_update"),
        "keeps `_state`, by row of the batch, where the scorer reads which requests have a thinking budget",
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
    Symbol(_V2_RUNNER, "GPUModelRunner.sample_tokens", ("self", "grammar_output"), "counts what is accepted"),
    Symbol(f"{_V2}.async_utils", "async_copy_to_np", ("x",), "counts what is accepted"),
    Symbol("vllm.v1.outputs", "AsyncModelRunnerOutput.get_output", ("self",), "counts what is accepted"),
    Symbol(f"{_V2}.metrics.logits", "get_num_nans", ("logits",), "counts NaNs as the base class does"),
    Symbol(
        f"{_V2}.sample.logprob",
        "compute_topk_scores",
        (
            "logits",
            "num_logprobs",
            "sampled_token_ids",
            "cu_num_logits",
            "logprob_token_ids_state",
            "expanded_idx_mapping",
            "max_per_req_token_ids",
            "logits_mode",
        ),
        "logprobs of named tokens",
    ),
    Symbol(_VERIFIER, "get_max_chunk_logits", ("vocab_size",), "bounds the sampler's memory"),
    Symbol(
        _VERIFIER,
        "RejectionSampler.__init__",
        ("self", "sampler", "spec_config", "device"),
        "made by our runner",
    ),
    Symbol(
        f"{_V2}.sample.sampler",
        "Sampler.get_logprobs_dims",
        ("self", "idx_mapping_np"),
        "logprobs along the path",
    ),
    Symbol(
        f"{_V2}.sample.states",
        "SamplingStates.max_num_logprobs",
        ("self", "idx_mapping_np"),
        "logprobs along the path",
    ),
    Symbol(
        f"{_V2}.sample.logits_processor.interface",
        "LogitsProcessor.add_request",
        ("self", "req_idx", "sampling_params"),
        "who takes chains",
    ),
    Symbol(
        f"{_V2}.input_batch",
        "InputBatch.make_dummy",
        ("cls", "num_reqs", "num_tokens", "input_buffers", "max_query_len"),
        "CUDA graphs of drafting",
    ),
    Symbol(
        "vllm.v1.core.sched.async_scheduler",
        "AsyncScheduler.__init__",
        ("self",),
        "sizes of trees",
    ),
    Symbol("vllm.v1.core.sched.scheduler", "Scheduler.__init__", ("self", "vllm_config"), "sizes of trees"),
    Symbol(
        _SPECULATOR,
        "DraftModelSpeculator.__init__",
        ("self", "vllm_config", "device"),
        "care of the head's layers and cache",
    ),
    Symbol(_SPECULATOR, "BaseSpeculator.capture", ("self",), "CUDA graphs of drafting"),
    Symbol(
        _SPECULATOR,
        "BaseSpeculator.init_cudagraph_manager",
        ("self", "cudagraph_mode"),
        "CUDA graphs of drafting",
    ),
    Symbol(
        "vllm.forward_context",
        "set_forward_context",
        ("attn_metadata", "vllm_config", "num_tokens"),
        "the head's forward",
    ),
    Symbol("vllm.utils.torch_utils", "async_tensor_h2d", ("data",), "copies to the device"),
    Symbol(
        "vllm.v1.attention.backends.registry", "register_backend", ("backend", "class_path"), "tree attention"
    ),
)

_NAMES_ON_V2 = {
    "vllm.config.compilation": {
        "CUDAGraphMode": "FULL FULL_DECODE_ONLY NONE decode_mode",
    },
    "vllm.config.model": {"": "PROCESSED_LOGPROBS_MODES"},
    "vllm.config.vllm": {"VllmConfig": "parallel_config scheduler_config speculative_config"},
    "vllm.distributed.parallel_state": {"": "get_tensor_model_parallel_world_size get_tp_group"},
    "vllm.logger": {"": "init_logger"},
    "vllm.model_executor.model_loader": {"": "get_model"},
    "vllm.sampling_params": {
        "SamplingParams": "bad_words frequency_penalty presence_penalty repetition_penalty structured_outputs "
        "thinking_token_budget all_stop_token_ids",
    },
    "vllm.v1.attention.backend": {
        "AttentionCGSupport": "UNIFORM_BATCH",
        "AttentionType": "DECODER",
        "CommonAttentionMetadata": "block_table_tensor max_query_len query_start_loc seq_lens",
    },
    "vllm.v1.attention.backends.flash_attn": {
        "FlashAttentionBackend": "get_builder_cls get_impl_cls",
        "FlashAttentionImpl": "num_heads kv_cache_dtype sliding_window",
    },
    "vllm.v1.attention.backends.registry": {"AttentionBackendEnum": "TRITON_ATTN FLASH_ATTN CPU_ATTN"},
    "vllm.v1.attention.backends.triton_attn": {
        "TritonAttentionBackend": "get_builder_cls get_impl_cls",
        "TritonAttentionImpl": "num_heads kv_cache_dtype sliding_window",
    },
    "vllm.v1.attention.backends.utils": {"": "PAD_SLOT_ID"},
    "vllm.v1.core.sched.output": {
        "": "GrammarOutput",
        "SchedulerOutput": "num_scheduled_tokens scheduled_new_reqs scheduled_spec_decode_tokens "
        "total_num_scheduled_tokens",
    },
    "vllm.v1.core.sched.scheduler": {"Scheduler": "dynamic_sd_lookup num_spec_tokens"},
    "vllm.v1.kv_cache_interface": {"": "AttentionSpec", "KVCacheConfig": "kv_cache_groups"},
    "vllm.v1.outputs": {
        "": "LogprobsTensors",
        "ModelRunnerOutput": "req_id_to_index sampled_token_ids",
    },
    f"{_V2}.cudagraph_utils": {
        "BatchExecutionDescriptor": "num_reqs num_tokens uniform_token_count",
        "CudaGraphManager": "_candidates _capture_descs _graphs_captured compilation_config cudagraph_mode max_num_reqs "
        "needs_capture",
    },
    f"{_V2}.input_batch": {
        "InputBatch": "cu_num_logits cu_num_logits_np expanded_idx_mapping expanded_local_pos idx_mapping idx_mapping_np "
        "input_ids logits_indices num_computed_tokens_np num_draft_tokens num_draft_tokens_per_req num_reqs "
        "num_scheduled_tokens num_tokens positions query_start_loc seq_lens seq_lens_cpu_upper_bound",
        "InputBuffers": "device max_num_tokens positions query_start_loc seq_lens",
    },
    _V2_RUNNER: {
        "GPUModelRunner": "attn_groups compilation_config device dtype kv_cache_config max_num_reqs max_num_tokens "
        "model_config num_speculative_steps parallel_config rejection_sampler req_states sampler speculative_config "
        "speculator use_aux_hidden_state_outputs vllm_config",
    },
    f"{_V2}.sample.logprob": {"": "LogprobTokenIdsState"},
    f"{_V2}.sample.output": {"SamplerOutput": "sampled_token_ids logprobs_tensors num_sampled num_rejected"},
    f"{_V2}.sample.sampler": {
        "Sampler": "compute_nans logits_processors logprob_token_ids_state logprobs_mode req_states return_sampling_mask "
        "sampling_states",
    },
    f"{_V2}.sample.states": {"SamplingStates": "temperature"},
    _VERIFIER: {"RejectionSampler": "sampler"},
    _SPECULATOR: {
        "DraftModelSpeculator": "attn_cg_support attn_groups block_tables device draft_attn_layer_names "
        "draft_max_seq_len draft_model_config draft_tokens dtype hidden_size idx_mapping input_buffers kv_cache_config "
        "max_model_len max_num_reqs max_num_tokens model model_state num_speculative_steps speculative_config vllm_config",
    },
    f"{_V2}.states": {
        "RequestState": "device draft_tokens max_num_reqs max_seq_len num_speculative_steps prefill_len req_id_to_index "
        "total_len",
    },
    "vllm.v1.worker.gpu_worker": {"Worker": "device use_v2_model_runner"},
    "vllm.v1.worker.worker_base": {"WorkerBase": "vllm_config"},
}
"""By module and class ("": none), names that `engine.v2` and its backends read or set."""

RELIED_ON = (
    *_ON_V1,
    *_ON_V2,
    *(
        Symbol(module, f"{owner}.{name}" if owner else name, (), "read or set on V2")
        for module, owners in _NAMES_ON_V2.items()
        for owner, names in owners.items()
        for name in names.split()
    ),
)


def complaints(version: str) -> list[str]:
    """What in the installed vLLM is not as this release of Clover expects.

    Nothing is read of a supported release, since our tests compare all of it: every process of vLLM asks at its start.

    Args:
        version: `vllm.__version__`.
    """
    if version.split("+")[0] in SUPPORTED_VLLM:
        return []
    return [f"vLLM is {version}", *differences()]


def differences() -> list[str]:
    """Symbols of `HOOKS` and `RELIED_ON` that the installed vLLM lacks or that take other arguments there; takes a second."""
    found = []
    for symbol in (*HOOKS, *RELIED_ON):
        arguments = _arguments(symbol.module, symbol.name)
        if arguments is None:
            found.append(f"{symbol.module}.{symbol.name} does not exist")
        elif arguments[: len(symbol.arguments)] != symbol.arguments:
            found.append(f"{symbol.module}.{symbol.name} takes other arguments")
    return found


@cache
def _source(module: str) -> ast.Module:
    """A module's source file, found without importing its packages; empty if there is none."""
    package, *names = module.split(".")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder, *names)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
    return ast.parse("")


@cache
def _functions(module: str) -> dict[str, tuple[str, ...]]:
    """Functions and methods of a module's source file, with their positional arguments."""
    found: dict[str, tuple[str, ...]] = {}
    for node in _source(module).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = _names(node)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    found[f"{node.name}.{member.name}"] = _names(member)
    return found


def _names(function: ast.FunctionDef) -> tuple[str, ...]:
    return tuple(argument.arg for argument in function.args.args)


@cache
def _other_names(module: str) -> frozenset[str]:
    """Classes of a module's source file, what it assigns, and attributes of its classes."""
    found = set(_assigned(_source(module)))
    for node in _source(module).body:
        if isinstance(node, ast.ClassDef):
            found |= {node.name, *(f"{node.name}.{name}" for name in _assigned(node))}
    return frozenset(found)


def _assigned(owner: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Names in the body of a module or class, and attributes that a class's methods set."""
    for node in owner.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))
        for inner in ast.walk(node) if isinstance(owner, ast.ClassDef) else ():
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                yield inner.attr


def _arguments(module: str, name: str) -> tuple[str, ...] | None:
    found = _functions(module).get(name)
    return () if found is None and name in _other_names(module) else found
