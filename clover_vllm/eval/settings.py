"""What `clover-vllm eval` is asked for. Light: the command line reads it first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clover_vllm.base.errors import UserError


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
