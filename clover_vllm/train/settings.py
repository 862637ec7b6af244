"""What `clover-vllm data` and `train` are asked for. Light: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from clover_vllm.base.command_line import LEFT_OVER, Parsed, names, numbers_or_none
from clover_vllm.heads.registry import HEADS, shaped_heads

SHAPES_HEADS = {
    "num_hidden_layers": "num_layers",
    "norm_state": "norm_state",
    "target_layers": "target_layers",
}
"""Options of `train` by the field of a new head's configuration that they set (`HeadKind.shaped_by`)."""


@dataclass
class DataSettings:
    """What `clover-vllm data` was asked for.

    A prompt's temperature is 0 for `greedy_share` of the prompts, else drawn evenly between
    `min_temperature` and `max_temperature`; both draws depend on the prompt alone. `flags` are more of the engine,
    as `vllm serve` takes them.

    Args:
        target: Target model folder or hub name.
        prompts: JSON lines with prompt, messages or turns (the first is asked).
        output: Folder for the answer shards; resumes what is there.
        max_tokens: Longest answer, tokens.
        greedy_share: Share of prompts answered greedily.
        min_temperature: Lowest temperature of the others.
        max_temperature: Highest temperature of the others.
        limit: Use at most this many prompts.
        skip: Leave out this many prompts at the beginning.
        tasks: Also answer this many prompts made from the others: translation, retrieval, summaries, code, second turns.
        task_answers: Answers to some of the prompts, which second turns and changes to code are made from.
        seconds: Begin no further shard after this many seconds of generating.
        held_out: Answer the held-out 2% of prompts instead of the rest.
        shard_size: Prompts per shard; a kill loses at most one.
        max_num_seqs: Requests that run at once.
        max_model_len: Longest prompt plus answer, tokens.
        dtype: auto, bfloat16, float16 or float32.
        seed: Seed of temperatures and of sampling.
        ray: On the Ray cluster that RAY_ADDRESS names, that this host belongs to, or that is started here; --output must be a
            folder of all hosts.
        replicas: Most engines, with --ray.
        replica_cpus: Cores of an engine, with --ray.
        replica_gpus: GPUs of an engine, with --ray.
    """

    target: str
    prompts: list[Path]
    output: Path
    max_tokens: int = 256
    greedy_share: float = 0.5
    min_temperature: float = 0.7
    max_temperature: float = 1.0
    limit: int | None = None
    skip: int = 0
    tasks: Annotated[int, typer.Option(min=0)] = 0
    task_answers: list[Path] | None = None
    seconds: float | None = None
    held_out: bool = False
    shard_size: int = 512
    max_num_seqs: int = 96
    max_model_len: int = 2048
    dtype: str = "auto"
    seed: int = 0
    ray: bool = False
    replicas: Annotated[int, typer.Option(min=1)] = 1
    replica_cpus: Annotated[int, typer.Option(min=1)] = 1
    replica_gpus: Annotated[int, typer.Option(min=0)] = 0
    flags: Annotated[list[str], LEFT_OVER] = field(default_factory=list)


def _shapes(field: str, does: str) -> str:
    """Help of an option of new heads."""
    return f"A new head ({shaped_heads(field)}) {does}."


def _published(weight: str) -> str:
    """A loss weight of every method."""
    return ", ".join(f"{getattr(kind, weight):g} for {kind.method}" for kind in HEADS.values())


@dataclass
class TrainSettings:
    """What `clover-vllm train` was asked for.

    Args:
        target: Target model folder or hub name; it is frozen.
        data: Answer files, or folders of them.
        output: Folder for head, checkpoints and log; resumes.
        init_from: Continue from this head of the same method, in its shape.
        epochs: Passes over the answers; may be a fraction.
        batch_tokens: Answer tokens per micro-batch, about.
        accumulate: Micro-batches per step and GPU.
        optimizer: adamw (as published) or muon.
        learning_rate: Peak learning rate.
        schedule: cosine, linear or constant, after the warm-up.
        warmup: Share of the steps that warm up.
        clip_value: Clip gradients at this value; 0 does not.
        weight_decay: AdamW's weight decay.
        draft_vocab: Draft only this many tokens, the most frequent of the answers.
        num_heads: Draft depths that are trained.
        target_temperature: Of the target's distribution in the vocabulary loss; below 1 is nearer to greedy.
        acceptance: How fast the vocabulary loss gives way to total variation as drafts get accepted; 3 is usual.
        scale_inputs: Bring both inputs to RMS 1; off, as published.
        max_length: Longest prompt plus answer, tokens.
        limit_tokens: Stop after this many answer tokens.
        leave_out: Sources whose answers are kept for measuring, such as xquad_translate,squad_rag.
        validation: Answers set aside, at most one in 20; their loss is measured at each checkpoint.
        ray_workers: Train on this many workers of a Ray cluster, with a GPU each if there are so many; `output` and `data`
            lie on a disk that its hosts share.
        trackers: Where loss and accuracy go too, such as tensorboard or wandb; each a package of its own.
        cache_gib: Disk for hidden states, GiB; pays from the second epoch on.
        cache: Folder for them [in CLOVER_HOME].
        save_every: Steps between checkpoints.
        log_every: Steps between log entries.
        seed: Of first weights and order.
        dtype: bfloat16 (autocast) or float32.
    """

    target: str
    data: list[Path]
    output: Path
    method: Annotated[str, typer.Option(help=f"Kind of head: {', '.join(HEADS)}.")] = "clover2"
    init_from: Path | None = None
    epochs: float = 4.0
    batch_tokens: int = 2048
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: Annotated[float, typer.Option(min=0, max=1)] = 0.04
    regression_weight: Annotated[
        float | None, typer.Option(help=f"Weight of SmoothL1, as published: {_published('regression')}.")
    ] = None
    vocabulary_weight: Annotated[
        float | None,
        typer.Option(help=f"Weight of the cross entropy, as published: {_published('vocabulary')}."),
    ] = None
    depth_decay: Annotated[
        float | None,
        typer.Option(
            help=f"A head's loss weighs this much less per depth, as published: {_published('decay')}."
        ),
    ] = None
    clip_value: float = 0.5
    weight_decay: float = 0.0
    draft_vocab: int | None = None
    num_heads: int = 5
    num_layers: Annotated[
        int | None,
        typer.Option(min=1, help=_shapes("num_hidden_layers", "has this many layers (2 if not said)")),
    ] = None
    norm_state: Annotated[
        bool, typer.Option(help=_shapes("norm_state", "norms the recurrent state that it passes on"))
    ] = False
    target_layers: Annotated[
        list[int],
        Parsed(numbers_or_none),
        typer.Option(
            help=_shapes("target_layers", "also reads what enters these layers of the target, such as 2,15")
        ),
    ] = field(default_factory=list)
    target_temperature: Annotated[float, typer.Option(min=0.01)] = 1.0
    acceptance: Annotated[float, typer.Option(min=0)] = 0.0
    scale_inputs: bool = True
    max_length: int = 2048
    limit_tokens: Annotated[int | None, typer.Option(min=1)] = None
    leave_out: Annotated[list[str], Parsed(names)] = field(default_factory=list)
    validation: Annotated[int, typer.Option(min=0)] = 128
    ray_workers: Annotated[int | None, typer.Option(min=1)] = None
    trackers: Annotated[list[str], Parsed(names)] = field(default_factory=list)
    cache_gib: float = 0.0
    cache: Path | None = None
    save_every: Annotated[int, typer.Option(min=1)] = 100
    log_every: Annotated[int, typer.Option(min=1)] = 10
    seed: Annotated[int, typer.Option(min=0)] = 0
    dtype: str = "bfloat16"
