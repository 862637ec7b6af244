"""What `clover-vllm eval` and `compare` are asked for. Light: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from clover_vllm.base.command_line import Parsed, names, numbers, reals
from clover_vllm.base.errors import UserError
from clover_vllm.heads.registry import HEADS, head_kind

MAX_NODES = 63
"""As `tree.MAX_NODES`, which needs torch."""


@dataclass
class EvalSettings:
    """What `clover-vllm eval` was asked for.

    Args:
        target: Target model folder or hub name.
        answers: Greedy answers of the target, from `data`.
        head: Head folder; may be given several times.
        output: JSON file, or a folder for eval.json; a plot goes beside it.
        nodes: Best-first tree of this size, instead of the usual set; may be given several times.
        limit: Use at most this many answers.
        sources: Of these sources alone, such as xquad_translate,squad_rag.
        draft_vocab_of: EAGLE-1 heads draft from this head's vocabulary.
        dtype: Of the target: bfloat16 or float32.
        record: Write the measured first_acceptance into the head's config.json.
    """

    target: str
    answers: list[Path]
    head: list[Path]
    output: Path | None = None
    nodes: list[int] | None = None
    limit: int | None = None
    sources: Annotated[list[str], Parsed(names)] = field(default_factory=list)
    draft_vocab_of: Path | None = None
    dtype: str = "bfloat16"
    record: bool = False

    def check(self) -> None:
        """
        Raises:
            UserError: a setting is impossible.
        """
        if self.record and self.nodes:
            raise UserError("--record needs the usual set of trees; leave --nodes out.")
        if self.nodes and min(self.nodes) < 1:
            raise UserError("--nodes must be 1 or more.")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit} must be 1 or more.")
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"--dtype {self.dtype} is not supported; use bfloat16 or float32.")


@dataclass
class CompareSettings:
    """What `clover-vllm compare` was asked for.

    Args:
        target: Target model folder or hub name.
        data: Answer files, or folders of them, that every head is trained on.
        development: Greedy answers that learning rate and batch are chosen on.
        answers: Greedy answers that are measured; their sources are the task families.
        output: JSON file, or a folder for compare.json; a plot goes beside it.
        work: Folder for the heads; a stopped comparison goes on there.
        methods: Kinds of heads; ratios are to the first.
        epochs: Passes over the answers for every head; may be a fraction.
        tuning_epochs: The same for every pair of learning rate and batch that is tried.
        learning_rates: Peak learning rates that are tried.
        batch_tokens: Answer tokens per micro-batch that are tried.
        optimizer: adamw or muon, for all.
        draft_vocab: Draft only this many tokens, the most frequent of the answers.
        num_heads: Draft depths that are trained, for methods that have several.
        nodes: Best-first trees of these sizes, besides a chain of 5 and the published tree; the first decides.
        seeds: Heads per method, trained with other seeds.
        limit: Use at most this many answers to measure, and to choose.
        max_length: Longest prompt plus answer, tokens.
        cache_gib: Disk for hidden states, GiB.
        dtype: bfloat16 (autocast) or float32.
    """

    target: str
    data: list[Path]
    development: list[Path]
    answers: list[Path]
    output: Path
    work: Path
    methods: Annotated[list[str], Parsed(names)] = field(default_factory=lambda: list(HEADS))
    epochs: float = 4.0
    tuning_epochs: float = 0.5
    learning_rates: Annotated[list[float], Parsed(reals)] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3])
    batch_tokens: Annotated[list[int], Parsed(numbers)] = field(default_factory=lambda: [1024, 4096])
    optimizer: str = "adamw"
    draft_vocab: int | None = None
    num_heads: int = 5
    nodes: Annotated[list[int], Parsed(numbers)] = field(default_factory=lambda: [8, 25])
    seeds: int = 1
    limit: int | None = None
    max_length: int = 2048
    cache_gib: float = 0.0
    dtype: str = "bfloat16"

    def check(self) -> None:
        """
        Raises:
            UserError: a setting is impossible. What `train` checks is left to it.
        """
        for method in self.methods:
            head_kind(method)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UserError("--methods must name at least one kind of head, each once.")
        if not self.nodes or min(self.nodes) < 1 or max(self.nodes) > MAX_NODES:
            raise UserError(f"--nodes must be numbers from 1 to {MAX_NODES}, such as 8,25.")
        if self.seeds < 1:
            raise UserError("--seeds must be 1 or more.")
        if not self.learning_rates or not self.batch_tokens:
            raise UserError("--learning-rates and --batch-tokens must name at least one each.")
        if not (self.epochs > 0 and self.tuning_epochs > 0):
            raise UserError("--epochs and --tuning-epochs must be positive.")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit} must be 1 or more.")
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"--dtype {self.dtype} is not supported; use bfloat16 or float32.")


@dataclass
class RenderSettings:
    """What `clover-vllm render` was asked for.

    Args:
        root: Folder of README.md, docs and results.
        check: Change nothing; fail if something would change.
    """

    root: Annotated[Path, typer.Argument()] = Path()
    check: bool = False
