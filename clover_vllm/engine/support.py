"""What Clover-2 refuses: one table, from which the configuration, the worker and the docs are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig
from vllm import envs
from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.triton_utils import HAS_TRITON
from vllm.v1.kv_cache_interface import KVCacheConfig

from clover_vllm.base.errors import UserError
from clover_vllm.heads.registry import TREE_HEADS, HeadKind

WORKERS = {
    "cpu": "clover_vllm.engine.worker.CloverCPUWorker",
    "cuda": "clover_vllm.engine.gpu_worker.CloverGPUWorker",
}
"""Worker class by `vllm.platforms.current_platform.device_type`."""


def prefers_v2() -> bool:
    """Whether vLLM is to run its V2 model runner, as far as the environment and Triton say."""
    chosen = envs.VLLM_USE_V2_MODEL_RUNNER
    return HAS_TRITON if chosen is None else bool(chosen)


OTHER_ATTENTION = "attention other than vLLM's CPU, Triton and FlashAttention backends"
USE_CHAIN = 'set the speculative option "tree" to "chain"'


@dataclass(frozen=True)
class Setup:
    """What is known before the engine starts.

    Attributes:
        device: `vllm.platforms.current_platform.device_type`.
        engine_args: that all of it comes from.
        head: its config.json, once that has been read.
    """

    target: ModelConfig
    parallel: ParallelConfig
    device: str
    engine_args: EngineArgs
    head: PretrainedConfig | None = None


@dataclass(frozen=True)
class Refusal:
    """One thing that Clover-2 does not work with.

    Attributes:
        what: its name in the sentence; details may follow it.
        why: for the docs.
        instead: what to do.
        detect: finds it before the engine starts; a string is a detail for the sentence. None: only the
            worker can tell.
        trees_only: chains work with it.
        in_worker: the worker checks too, on what it has loaded.
        of_head: `detect` looks at the head.
    """

    what: str
    why: str
    instead: str
    detect: Callable[[Setup], bool | str] | None
    trees_only: bool = False
    in_worker: bool = False
    of_head: bool = False

    @property
    def found(self) -> str:
        """When, for the docs."""
        times = {"at start": self.detect, "by the worker": self.in_worker}
        return ", ".join(name for name, applies in times.items() if applies)

    def error(self, detail: str = "") -> UserError:
        """The sentence for users."""
        what = f"{self.what} {detail}" if detail else self.what
        verb = "cannot verify trees" if self.trees_only else "does not work"
        return UserError(f"Clover-2 {verb} with {what}; {self.instead}.")


def is_tree_cache_dtype(cache_dtype: str, dtype: torch.dtype) -> bool:
    """Whether trees are verified with this `--kv-cache-dtype` and a target of this dtype."""
    return cache_dtype in ("auto", str(dtype).removeprefix("torch."))


def _other_device(setup: Setup) -> str:
    return "" if setup.device in WORKERS else repr(setup.device)


def _other_worker(setup: Setup) -> str:
    chosen = setup.parallel.worker_cls
    return "" if chosen in ("auto", WORKERS[setup.device]) else str(chosen)


def _hidden_states_missing(setup: Setup) -> str:
    if setup.device != "cpu":  # elsewhere a model's module may touch the device, which is the worker's to do
        return ""
    target = setup.target
    model, architecture = target.registry.resolve_model_cls(target.architectures, target)
    return "" if supports_eagle3(model) else f"(vLLM's {architecture} lacks SupportsEagle3)"


def _cache_dtype(setup: Setup) -> str:
    chosen = setup.engine_args.kv_cache_dtype
    return "" if is_tree_cache_dtype(chosen, setup.target.dtype) else str(chosen)


def _sliding_window(setup: Setup) -> bool:
    if prefers_v2():
        return False
    used = getattr(setup.target.hf_text_config, "use_sliding_window", True)
    return setup.target.get_sliding_window() is not None and bool(used)


def _without(able: Callable[[HeadKind], bool]) -> str:
    """Heads of methods that are not able to do something."""
    return f"{' and '.join(kind.title for kind in TREE_HEADS.values() if not able(kind))} heads"


def _kind(setup: Setup) -> HeadKind:
    """The head's method; those that have none are refused first."""
    assert setup.head is not None
    return TREE_HEADS[setup.head.model_type]


def _no_head(setup: Setup) -> str:
    model_type = getattr(setup.head, "model_type", None)
    known = ", ".join(TREE_HEADS)
    return "" if model_type in TREE_HEADS else f"of model_type {model_type!r} (known are {known})"


def _misfit(setup: Setup) -> str:
    """Which sizes of the head are not the target's."""
    head, target = setup.head, setup.target
    assert head is not None
    layers = target.get_total_num_hidden_layers()
    wrong = [
        f"{name} {getattr(head, name)}, where this one has {value}"
        for name, value in (
            ("hidden_size", target.get_hidden_size()),
            ("vocab_size", target.get_vocab_size()),
        )
        if getattr(head, name) != value
    ]
    if any(layer >= layers for layer in getattr(head, "target_layers", ())):
        wrong.append(f"layers {head.target_layers}, where this one has {layers}")
    return f"with {wrong[0]} (made for {head.target or 'a model that it does not name'})" if wrong else ""


def _trees(
    what: str, why: str, detect: Callable[[Setup], bool | str] | None, in_worker: bool = False
) -> Refusal:
    return Refusal(what, why, USE_CHAIN, detect, trees_only=True, in_worker=in_worker)


REFUSALS = (  # cheap checks first; the last one of those that always hold imports the target's module
    Refusal(
        "pipeline parallelism",
        "the head needs the last hidden states and the embeddings on one rank",
        "use tensor parallelism",
        lambda setup: setup.parallel.pipeline_parallel_size > 1,
    ),
    Refusal("the device", "there is no worker for others", f"it runs on {', '.join(WORKERS)}", _other_device),
    Refusal(
        "vLLM's V2 model runner without Triton",
        "the kernels are Triton's",
        "set VLLM_USE_V2_MODEL_RUNNER=0 to use the V1 model runner",
        lambda _: bool(envs.VLLM_USE_V2_MODEL_RUNNER) and not HAS_TRITON,
    ),
    _trees(
        "the V1 model runner on a GPU",
        "tree verification on GPUs is built on V2; leave VLLM_USE_V2_MODEL_RUNNER unset for trees",
        lambda setup: setup.device != "cpu" and not prefers_v2(),
        in_worker=True,
    ),
    Refusal(
        "batch-sharded sampling",
        "each rank would walk the trees of its requests alone",
        "remove --enable-batch-sharded-sampling",
        lambda setup: bool(setup.parallel.enable_batch_sharded_sampling),
    ),
    Refusal(
        "watermarks",
        "the tokens that a watermark chooses were never compared with plain vLLM's",
        "remove --watermark-config",
        lambda setup: setup.engine_args.watermark_config is not None,
    ),
    Refusal(
        "HiSparse",
        "its cache was never read by the tree kernel",
        "remove hisparse_config from --attention-config",
        lambda setup: setup.engine_args.attention_config.hisparse_config is not None,
    ),
    Refusal(
        "the worker class",
        "Clover-2 brings its own worker class",
        "remove --worker-cls",
        _other_worker,
    ),
    _trees(
        OTHER_ATTENTION,
        "no other kernel takes tree masks",
        None,
        in_worker=True,
    ),
    _trees("the KV cache type", "the tree kernel reads the target's dtype", _cache_dtype, in_worker=True),
    _trees(
        "a KV connector",
        "it may save rows before they are moved into place",
        lambda setup: setup.engine_args.kv_transfer_config is not None,
        in_worker=True,
    ),
    _trees(
        "multi-head latent attention",
        "its cache holds no keys and values per head",
        lambda setup: setup.target.use_mla,
    ),
    _trees(
        "M-RoPE",
        "the position of a node would be three numbers",
        lambda setup: setup.target.uses_mrope,
        in_worker=True,
    ),
    _trees(
        "soft-capped scores",
        "the tree kernel does not cap",
        lambda setup: bool(getattr(setup.target.hf_text_config, "attn_logit_softcapping", None)),
        in_worker=True,
    ),
    _trees(
        "ALiBi",
        "the tree kernel adds no bias",
        lambda setup: bool(getattr(setup.target.hf_text_config, "alibi", False)),
        in_worker=True,
    ),
    _trees(
        "sliding-window attention",
        "the CPU's tree kernel attends to the whole prefix; Triton's, on V2, knows windows",
        _sliding_window,
        in_worker=True,
    ),
    _trees(
        "chunked local attention",
        "the tree kernel attends to the whole prefix",
        lambda setup: setup.target.attention_chunk_size is not None,
    ),
    _trees(
        "state-space layers",
        "a state has no rows that could be masked",
        lambda setup: setup.target.is_hybrid or setup.target.is_attention_free,
    ),
    _trees("several kinds of attention", "accepted rows are moved in one KV cache group", None, True),
    _trees("the CPU attention kernel", "the tree kernel reads one of vLLM's cache layouts", None, True),
    _trees("attention sinks", "the tree kernel adds none", None, True),
    _trees("layers that share their KV cache", "their rows would be moved twice", None, True),
    _trees(
        "layers whose caches differ in shape", "accepted rows are moved in all layers at once", None, True
    ),
    _trees("attention that is not a decoder's", "tree masks are causal", None, True),
    Refusal(
        "disable_eagle_block_drop in steps that hold no more rows than a request drafts",
        "vLLM's scheduler would wait for ever to admit a request with one token left to compute",
        "raise --max-num-batched-tokens above num_speculative_tokens",
        None,
        in_worker=True,
    ),
    Refusal(
        "a draft model",
        "it drafts no trees",
        "`clover-vllm convert` turns a published checkpoint into a head",
        _no_head,
        of_head=True,
    ),
    Refusal(
        f"vLLM's V2 model runner and {_without(lambda kind: kind.on_v2)}",
        "they draft on V1 only so far",
        "set VLLM_USE_V2_MODEL_RUNNER=0 to use the V1 model runner",
        lambda setup: prefers_v2() and not _kind(setup).on_v2,
        of_head=True,
    ),
    Refusal(
        "a head of another target",
        "it reads this target's hidden states and lm_head",
        "give a head that was trained for this target",
        _misfit,
        of_head=True,
    ),
    Refusal(
        f"tensor parallelism and {_without(lambda kind: kind.on_ranks)}",
        "they draft on one rank only so far",
        "set --tensor-parallel-size to 1",
        lambda setup: setup.parallel.tensor_parallel_size > 1 and not _kind(setup).on_ranks,
        of_head=True,
    ),
    Refusal(
        "tensor parallelism and heads that read earlier layers of the target (target_layers)",
        "they draft on one rank only so far",
        "set --tensor-parallel-size to 1",
        lambda setup: (
            setup.parallel.tensor_parallel_size > 1 and bool(getattr(setup.head, "target_layers", ()))
        ),
        of_head=True,
    ),
    Refusal(
        "a target that does not return its hidden states",
        "the head reads the target's last hidden state",
        "serve this target without Clover-2",
        _hidden_states_missing,
    ),
)

_BY_NAME = {refusal.what: refusal for refusal in REFUSALS}


def check_supported(setup: Setup, trees: bool) -> None:
    """Refuse what can be seen before anything is loaded: with the head's configuration what depends on it, without it the rest.

    Args:
        setup: the engine's.
        trees: whether trees may branch.

    Raises:
        UserError: the first refusal that applies.
    """
    for refusal in REFUSALS:
        if refusal.detect is None or (refusal.trees_only and not trees):
            continue
        if refusal.of_head != (setup.head is not None):
            continue
        found = refusal.detect(setup)
        if found:
            raise refusal.error(found if isinstance(found, str) else "")


def check_step(config: VllmConfig) -> None:
    """Refuse steps that are too small for vLLM's scheduler; for runners, which know their size.

    Raises:
        UserError: they are.
    """
    spec, rows = config.speculative_config, config.scheduler_config.max_num_batched_tokens
    if spec.disable_eagle_block_drop and rows <= spec.num_speculative_tokens:
        what = "disable_eagle_block_drop in steps that hold no more rows than a request drafts"
        raise refuse(what, f"({rows} and {spec.num_speculative_tokens})")


def check_cache(config: VllmConfig, cache: KVCacheConfig) -> None:
    """Refuse trees over caches whose rows cannot be moved, for runners, which know theirs.

    Raises:
        UserError: the first refusal that applies.
    """
    refuse_found(
        {
            "several kinds of attention": len(cache.kv_cache_groups) != 1,
            "M-RoPE": config.model_config.uses_mrope,
            "a KV connector": config.kv_transfer_config is not None,
        }
    )


def check_shapes(caches: Sequence[torch.Tensor]) -> None:
    """Refuse trees over layers whose caches are not alike.

    Raises:
        UserError: they are not.
    """
    if len({(cache.shape, cache.stride()) for cache in caches}) > 1:
        raise refuse_trees("layers whose caches differ in shape")


def refuse(what: str, detail: str = "") -> UserError:
    """The sentence of a refusal in the table, for checks outside this module.

    Args:
        what: `Refusal.what`.
        detail: follows it, such as the name of a type.

    Raises:
        KeyError: the table has no such entry.
    """
    return _BY_NAME[what].error(detail)


def refuse_trees(what: str, detail: str = "") -> UserError:
    """As `refuse`, for what only trees do not work with."""
    assert _BY_NAME[what].trees_only, f"{what} is refused with chains too"
    return refuse(what, detail)


def refuse_found(problems: Mapping[str, bool]) -> None:
    """Refuse trees for the first problem that was found. All names are looked up, found or not.

    Args:
        problems: by `Refusal.what`, whether it is there.

    Raises:
        UserError: one is.
        KeyError: the table has no such entry.
    """
    errors = {what: refuse_trees(what) for what in problems}
    for what, found in problems.items():
        if found:
            raise errors[what]


def refusal_table() -> str:
    """All refusals as a Markdown table."""
    lines = ["| refused | with | why | what to do | found |", "|---|---|---|---|---|"]
    for refusal in REFUSALS:
        cells = (
            refusal.what,
            "trees" if refusal.trees_only else "trees and chains",
            refusal.why,
            refusal.instead,
            refusal.found,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
