"""vLLM's speculative configuration for the method `clover2`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import SkipValidation, ValidationError
from transformers import PretrainedConfig
from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

from clover_vllm.base.errors import UserError
from clover_vllm.engine.metrics import export_counters
from clover_vllm.engine.options import METHOD, CloverOptions, split_options
from clover_vllm.engine.support import WORKERS, Setup, check_supported, prefers_v2
from clover_vllm.heads.registry import TREE_HEADS, check_head
from clover_vllm.heads.weights import check_target_folder
from clover_vllm.tree import MAX_NODES

logger = init_logger("vllm.clover")

SCHEDULER = "clover_vllm.engine.v2.scheduler.make_scheduler"
"""What sizes trees on the V2 runner, for `SchedulerConfig.scheduler_cls`."""

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
    """Folder of the files in which workers count (`engine.metrics`)."""

    def __post_init__(self) -> None:
        target = self.target_model_config
        self.prompt_lookup_min = self.prompt_lookup_max = 0
        # With the V1 runner, drafts are made from token ids on the host, one list per request, after bookkeeping.
        self.disable_padded_drafter_batch = not prefers_v2()
        self.draft_model_config = draft_model_config(self, target)
        hf_config = self.draft_model_config.hf_config
        hf_config.eagle_aux_hidden_state_layer_ids = [
            *getattr(hf_config, "target_layers", ()),
            target.get_total_num_hidden_layers(),
        ]
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
        """Whether each token is an ordinary sampling step, with all of its parameters (see `engine.seams`)."""
        return True

    def writes_accepted_rows_only(self) -> bool:
        """Whether drafting needs no cache slots beyond the step's own (see `engine.seams`)."""
        return True

    def compute_hash(self) -> str:
        # The target's compiled graph returns its last layer's output too, which the base class counts
        # in only for methods it knows; the head's has the number of candidates in it.
        candidates = self.clover.candidates(self.num_speculative_tokens)
        return f"{self.draft_model_config.hf_config.model_type}-{candidates}-{self.clover.head_precision}-{super().compute_hash()}"


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
        engine_args: that it all comes from; its scheduler is set where trees are sized there.

    Raises:
        UserError: an unknown option, a bad value, or something that Clover-2 does not support.
    """
    shared, options = _read_options(given)
    setup, trees = Setup(target, parallel, device, engine_args), options.tree != "chain"
    check_supported(setup, trees)
    folder = Path(shared["model"])
    if folder.is_dir() and shared.get("quantization") is None:
        check_head(folder, target.dtype)  # first, because it explains a bad config.json better
    made = _make_config(shared, options, target, parallel)
    head = made.draft_model_config.hf_config
    check_supported(replace(setup, head=head), trees)
    _check_ranks(options, made.num_speculative_tokens, head)
    _check_target(head, target)
    if not folder.is_dir() and shared.get("quantization") is None:
        _check_hub_head(made.draft_model_config, target, engine_args)
    parallel.worker_cls = WORKERS[device]
    if prefers_v2() and options.tree == "adaptive" and engine_args.scheduler_cls is None:
        engine_args.scheduler_cls = SCHEDULER
    made.counters = export_counters(made)
    logger.info(
        "%s drafts %s of at most %d nodes per request, with the head %s.",
        TREE_HEADS[head.model_type].title,
        "chains" if options.tree == "chain" else "trees",
        made.num_speculative_tokens,
        shared["model"],
    )
    return made


def _read_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], CloverOptions]:
    """vLLM's options, completed, and Clover's.

    Raises:
        UserError: an unknown option or a bad value.
    """
    shared, options = split_options(given, SHARED_OPTIONS)
    if not shared.get("model") or not isinstance(shared["model"], str):
        raise UserError('Clover-2 needs a head: give its folder or name as "model".')
    nodes = shared.setdefault("num_speculative_tokens", options.default_nodes)
    if type(nodes) is not int or not 1 <= nodes <= MAX_NODES:
        raise UserError(
            f"num_speculative_tokens is {nodes!r}; with Clover-2 it is the largest number of tree nodes "
            f"per request and step, from 1 to {MAX_NODES}."
        )
    shared["method"] = METHOD
    return shared, options


def _make_config(
    shared: dict[str, Any], options: CloverOptions, target: ModelConfig, parallel: ParallelConfig
) -> CloverSpeculativeConfig:
    """The configuration; reads the head's config.json, from the hub if need be.

    Raises:
        UserError: the head cannot be read, or vLLM's own checks fail.
    """
    try:
        return CloverSpeculativeConfig(
            **shared, clover=options, target_model_config=target, target_parallel_config=parallel
        )
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ").splitlines()[0].rstrip(".")
        raise UserError(f"The Clover-2 head {shared['model']!r} cannot be used: {reason}.") from error
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"The Clover-2 head {shared['model']!r} cannot be read: {reason}.") from error


def _check_target(head: PretrainedConfig, target: ModelConfig) -> None:
    """Refuse a head of another target of the same sizes, where the target is a local folder.

    Raises:
        UserError: the lm_head is another model's.
    """
    if Path(target.model).is_dir():
        tied = bool(getattr(target.hf_text_config, "tie_word_embeddings", False))
        check_target_folder(head, Path(target.model), tied)


def _check_hub_head(head: ModelConfig, target: ModelConfig, engine_args: EngineArgs) -> None:
    """Download the head's weights and check them.

    Raises:
        UserError: anything missing, damaged, misshapen, or not finite.
    """
    fetched = fetch_head(head, engine_args)
    if fetched is not None:
        check_head(fetched, target.dtype, head.hf_config)


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
