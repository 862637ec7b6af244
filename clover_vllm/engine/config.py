"""vLLM's speculative configuration for the method `clover2`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import SkipValidation, ValidationError
from transformers import PretrainedConfig
from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
from vllm.model_executor.models.interfaces import supports_eagle3

from clover_vllm.base.errors import UserError
from clover_vllm.engine.metrics import export_counters
from clover_vllm.engine.options import DEFAULT_NODES, METHOD, CloverOptions, split_options
from clover_vllm.heads.checkpoint import check_head, check_target_folder
from clover_vllm.heads.clover2.config import Clover2Config
from clover_vllm.tree import MAX_NODES

logger = init_logger("vllm.clover")

SHARED_OPTIONS = (
    "method",
    "model",
    "num_speculative_tokens",
    "revision",
    "code_revision",
    "quantization",
    "draft_tensor_parallel_size",
    "disable_eagle_block_drop",
)
"""Fields of `vllm.config.SpeculativeConfig` that mean for Clover-2 what they mean for EAGLE."""


def is_tree_cache_dtype(cache_dtype: str, dtype: torch.dtype) -> bool:
    """Whether trees are verified with this `--kv-cache-dtype` and a target of this dtype."""
    return cache_dtype in ("auto", str(dtype).removeprefix("torch."))


WORKERS = {
    "cpu": "clover_vllm.engine.worker.CloverCPUWorker",
    "cuda": "clover_vllm.engine.worker.CloverGPUWorker",
}
"""Worker class by `vllm.platforms.current_platform.device_type`."""


@config
class CloverSpeculativeConfig(SpeculativeConfig):
    """`vllm.config.SpeculativeConfig` whose method is open and which carries Clover's options.

    vLLM treats the method like EAGLE (`use_eagle`): the draft reads one token ahead, so the last
    block of a prefix-cache hit is recomputed and a prefill chunk never ends on the prompt's last
    token but one.
    """

    method: str | None = METHOD  # type: ignore[assignment]
    clover: SkipValidation[CloverOptions] = None  # type: ignore[assignment]
    counters: str = ""
    """Path of the files in which workers count, less their rank (`engine.metrics`)."""

    def __post_init__(self) -> None:
        target = self.target_model_config
        self.prompt_lookup_min = self.prompt_lookup_max = 0
        # Drafts are made from token ids on the host, one list per request, after bookkeeping.
        self.disable_padded_drafter_batch = True
        self.draft_model_config = draft_model_config(self, target)
        hf_config = self.draft_model_config.hf_config
        hf_config.eagle_aux_hidden_state_layer_ids = [target.get_total_num_hidden_layers()]
        # Drafting positions are the target's (as for EAGLE, vLLM issue 48894).
        hf_config.max_position_embeddings = target.max_model_len
        ranks = SpeculativeConfig._verify_and_get_draft_tp(
            self.target_parallel_config,
            self.draft_tensor_parallel_size,  # type: ignore[has-type]
            hf_config,
        )
        self.draft_tensor_parallel_size = ranks
        self.draft_model_config.max_model_len = target.max_model_len
        self.draft_parallel_config = SpeculativeConfig.create_draft_parallel_config(
            self.target_parallel_config, ranks, self.draft_model_config
        )

    def use_eagle(self) -> bool:
        return True

    def samples_every_token(self) -> bool:
        """Whether each token is an ordinary sampling step, with all of its parameters (see `engine.hooks`)."""
        return True

    def writes_accepted_rows_only(self) -> bool:
        """Whether drafting needs no cache slots beyond the step's own (see `engine.hooks`)."""
        return True

    def compute_hash(self) -> str:
        # The target's compiled graph returns its last layer's output too, which the base class counts
        # in only for methods it knows; the head's has the number of candidates in it.
        candidates = self.clover.candidates(self.num_speculative_tokens)
        return f"clover2-{candidates}-{super().compute_hash()}"


def draft_model_config(spec: SpeculativeConfig, target: ModelConfig) -> ModelConfig:
    """The head as a vLLM draft model; the arguments are those of SpeculativeConfig.__post_init__."""
    return ModelConfig(
        model=spec.model,
        runner="draft",
        tokenizer=target.tokenizer,
        tokenizer_mode=target.tokenizer_mode,
        trust_remote_code=target.trust_remote_code,
        allowed_local_media_path=target.allowed_local_media_path,
        allowed_media_domains=target.allowed_media_domains,
        dtype=target.dtype,
        seed=target.seed,
        revision=spec.revision,
        code_revision=spec.code_revision,
        tokenizer_revision=target.tokenizer_revision,
        spec_target_max_model_len=target.max_model_len,
        quantization=spec.quantization,
        enforce_eager=target.enforce_eager,
        max_logprobs=target.max_logprobs,
        config_format=target.config_format,
    )


def clover_config(
    given: Mapping[str, Any],
    target: ModelConfig,
    parallel: ParallelConfig,
    device: str,
    engine_args: EngineArgs,
) -> CloverSpeculativeConfig:
    """Validate a speculative configuration for Clover-2.

    Args:
        given: as the user wrote it.
        target: of the target model.
        parallel: of the target model; its worker class is set.
        device: `vllm.platforms.current_platform.device_type`.
        engine_args: that it all comes from.

    Raises:
        UserError: an unknown option, a bad value, or something that Clover-2 does not support.
    """
    shared, options = split_options(given, SHARED_OPTIONS)
    if not shared.get("model") or not isinstance(shared["model"], str):
        raise UserError('Clover-2 needs a head: give its folder or name as "model".')
    nodes = shared.setdefault("num_speculative_tokens", DEFAULT_NODES)
    if type(nodes) is not int or not 1 <= nodes <= MAX_NODES:
        raise UserError(
            f"num_speculative_tokens is {nodes!r}; with Clover-2 it is the largest number of tree nodes "
            f"per request and step, from 1 to {MAX_NODES}."
        )
    if parallel.pipeline_parallel_size > 1:
        raise UserError("Clover-2 does not work with pipeline parallelism yet; use tensor parallelism.")
    if device not in WORKERS:
        raise UserError(f"Clover-2 does not run on {device!r} yet; it runs on {', '.join(WORKERS)}.")
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        raise UserError("Clover-2 needs vLLM's V1 model runner; set VLLM_USE_V2_MODEL_RUNNER=0.")
    for wanted, found in (
        ("watermarks", engine_args.watermark_config),
        ("HiSparse", engine_args.attention_config.hisparse_config),
    ):
        if found is not None:  # either makes vLLM take that runner, whatever the environment says
            raise UserError(
                f"Clover-2 does not work with {wanted}, which vLLM's V2 model runner alone knows."
            )
    if device != "cpu" and options.tree != "chain":
        raise UserError(
            'Clover-2 verifies trees only on CPUs yet; set the speculative option "tree" to "chain".'
        )
    if parallel.worker_cls not in ("auto", WORKERS[device]):
        raise UserError(
            f"Clover-2 brings its own worker class, which --worker-cls {parallel.worker_cls} excludes."
        )
    if options.tree != "chain":
        _check_attention(target, engine_args.kv_cache_dtype, engine_args.kv_transfer_config is not None)
    if device == "cpu":  # elsewhere a model's module may touch the device, which is the worker's to do
        model, architecture = target.registry.resolve_model_cls(target.architectures, target)
        if not supports_eagle3(model):
            raise UserError(
                f"Clover-2 reads a hidden state that vLLM's {architecture} does not give out (it lacks "
                "SupportsEagle3); serve this target without Clover-2."
            )
    shared["method"] = METHOD
    folder = Path(shared["model"])
    if folder.is_dir() and shared.get("quantization") is None:
        check_head(folder, target.dtype)  # first, because it explains a bad config.json better
    try:
        made = CloverSpeculativeConfig(
            **shared, clover=options, target_model_config=target, target_parallel_config=parallel
        )
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ").splitlines()[0].rstrip(".")
        raise UserError(f"The Clover-2 head {shared['model']!r} cannot be used: {reason}.") from error
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"The Clover-2 head {shared['model']!r} cannot be read: {reason}.") from error
    check_fits(made.draft_model_config.hf_config, target)
    if not folder.is_dir() and shared.get("quantization") is None:
        fetched = fetch_head(made.draft_model_config, engine_args)
        if fetched is not None:
            check_head(fetched, target.dtype, made.draft_model_config.hf_config)
    if Path(target.model).is_dir():
        tied = bool(getattr(target.hf_text_config, "tie_word_embeddings", False))
        check_target_folder(made.draft_model_config.hf_config, Path(target.model), tied)
    _check_ranks(options, nodes, made.draft_model_config.hf_config)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # lest vLLM take it by itself
    parallel.worker_cls = WORKERS[device]
    made.counters = export_counters(made, str(target.served_model_name), parallel.data_parallel_size)
    return made


def fetch_head(head: ModelConfig, engine_args: EngineArgs) -> Path | None:
    """Folder of the head's weights, downloaded as the worker's loader would if they are not there yet.

    Args:
        head: as a draft model, whose config.json has been read.
        engine_args: say where downloads go.

    Returns:
        None where that cannot be told here; then the worker looks at the weights, and says so if it finds none.
    """
    folder = Path(head.model)
    if folder.is_dir():
        return folder
    if envs.VLLM_USE_MODELSCOPE or engine_args.load_format not in ("auto", "hf", "safetensors"):
        return None
    patterns = ["*.safetensors", "*.bin"]
    try:
        return Path(
            download_weights_from_hf(
                head.model,
                engine_args.download_dir,
                patterns[:1] if engine_args.load_format == "safetensors" else patterns,
                head.revision,
                ignore_patterns=engine_args.ignore_patterns,
            )
        )
    except Exception as error:  # whatever the hub's client and the network below it raise
        logger.warning("The weights of the head %s are left to the worker: %s", head.model, error)
        return None


def _check_attention(target: ModelConfig, cache_dtype: str, kv_connector: bool) -> None:
    """Refuse what trees are not verified with, as far as it can be seen before anything is loaded.

    The worker looks at every layer again (`CloverRunner._prepare_trees`).

    Raises:
        UserError: one sentence.
    """
    text = target.hf_text_config
    problems = {
        f"the KV cache type {cache_dtype}": not is_tree_cache_dtype(cache_dtype, target.dtype),
        "a KV connector, which may save rows before they are moved into place,": kv_connector,
        "multi-head latent attention": target.use_mla,
        "M-RoPE": target.uses_mrope,
        "soft-capped scores": bool(getattr(text, "attn_logit_softcapping", None)),
        "ALiBi": bool(getattr(text, "alibi", False)),
        "sliding-window attention": target.get_sliding_window() is not None
        and getattr(text, "use_sliding_window", True),
        "chunked local attention": target.attention_chunk_size is not None,
        "state-space layers": target.is_hybrid or target.is_attention_free,
    }
    for problem, found in problems.items():
        if found:
            raise UserError(
                f'Clover-2 cannot verify trees with {problem} yet; set the speculative option "tree" to "chain".'
            )


def _check_ranks(options: CloverOptions, num_nodes: int, head: PretrainedConfig) -> None:
    """Refuse a fixed tree that asks for more candidates than the head scores.

    Raises:
        UserError: it does.
    """
    shape = options.fixed_shape(num_nodes)
    scored = head.draft_vocab_size or head.vocab_size
    if shape is not None and shape.max_rank >= scored:
        raise UserError(
            f"Clover's option tree asks for child rank {shape.max_rank}, but the head scores only {scored} "
            "tokens, ranks from 0."
        )


def check_fits(head: PretrainedConfig, target: ModelConfig) -> None:
    """Refuse a head of another target before anything is loaded.

    Raises:
        UserError: not a Clover-2 head, or other sizes than the target's.
    """
    if not isinstance(head, Clover2Config):
        raise UserError(
            f"The head's config.json says model_type {head.model_type!r}, not 'clover2'; "
            "`clover-vllm convert` turns a published checkpoint into a head."
        )
    for name, value in (("hidden_size", target.get_hidden_size()), ("vocab_size", target.get_vocab_size())):
        if getattr(head, name) != value:
            raise UserError(
                f"The Clover-2 head was trained for a target with {name} {getattr(head, name)}, but this "
                f"target has {value}; it belongs to {head.target or 'another target'}."
            )
