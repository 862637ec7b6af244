"""Heads whose folder is a Hugging Face config.json of their own and their parameters, by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from clover_vllm.base.errors import UserError
from clover_vllm.heads.base import Head
from clover_vllm.heads.layers import Rotary
from clover_vllm.heads.weights import (
    check_draft_vocab,
    check_tensors,
    is_finite,
    read_config,
    read_tensors,
    write_checkpoint,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class SavedHead(Head):
    """Reads and writes such a folder; a subclass is made from its configuration alone."""

    config_class: ClassVar[type[PretrainedConfig]]
    title: ClassVar[str]  # of the method, in sentences

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        vocab = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("draft_vocab", vocab)

    @classmethod
    def read_config(cls, folder: Path) -> Any:
        """The validated configuration of a folder.

        Raises:
            UserError: missing, not JSON, another model type, or sizes that cannot work.
        """
        fields = read_config(folder)
        kind = fields.get("model_type")
        if kind != cls.config_class.model_type:
            raise UserError(
                f"{folder} is not a {cls.title} head: its config.json says model_type {kind!r}; "
                "convert a published checkpoint with `clover-vllm convert` first."
            )
        try:
            return cls.config_class.from_dict(fields)
        except UserError as error:
            raise UserError(f"{folder / 'config.json'}: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / 'config.json'} is not a {cls.title} config ({error}).") from error

    @classmethod
    def read(cls, folder: Path, dtype: torch.dtype | None = torch.float32, config: Any = None) -> Self:
        """Read a head.

        Args:
            folder: with config.json and weights.
            dtype: of the parameters; None keeps what the file has.
            config: instead of the folder's config.json.

        Raises:
            UserError: anything missing, damaged, misshapen or not finite.
        """
        config = config or cls.read_config(folder)
        tensors = read_tensors(folder)
        with torch.device("meta"):
            head = cls(config)
        check_tensors(tensors, head.state_dict(), str(folder))
        if config.draft_vocab_size is not None:
            check_draft_vocab(tensors["draft_vocab"], config.vocab_size, str(folder))
        for name, module in head.named_children():
            if isinstance(module, Rotary):  # derived, so it is in no file
                setattr(head, name, Rotary(config))
        if dtype is not None:
            tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        head.load_state_dict(tensors, assign=True)
        return head

    @classmethod
    def check(cls, folder: Path, dtype: torch.dtype, config: Any = None) -> None:
        """Refuse a head that an engine which computes in `dtype` could not draft with, before it starts.

        Raises:
            UserError: as `read`, or a weight is not finite in `dtype`.
        """
        for name, tensor in cls.read(folder, dtype, config).state_dict().items():
            if not is_finite(tensor):
                raise UserError(
                    f"Weights of {folder}: {name} is too large for {str(dtype).removeprefix('torch.')}; serve "
                    "with --dtype bfloat16 or float32."
                )

    def write(self, folder: Path, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "5GB") -> None:
        """Write the folder; see `write_checkpoint`.

        Raises:
            UserError: a weight is not finite (training has diverged), or the folder cannot be written.
        """
        tensors = {
            name: tensor.detach()
            .to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            .contiguous()
            for name, tensor in self.state_dict().items()
        }
        self.config.dtype = dtype
        write_checkpoint(tensors, self.config.to_json_string(use_diff=False), folder, max_shard_size)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls.read(folder)

    def save(self, folder: Path, target: str) -> None:  # noqa: ARG002, only vLLM's own methods ask for it
        self.write(folder)
