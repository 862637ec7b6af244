"""What the engine asks of every head whose drafts are trees, and what all of them share: the target's lm_head.

Legend: N rows of any requests, R roots, D hidden size, S numbers of a state, K candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.platforms import current_platform

from clover_vllm.base.errors import UserError
from clover_vllm.engine.models.int8 import Int8Linear, int8_linears, is_int8_quicker
from clover_vllm.engine.options import CloverOptions
from clover_vllm.heads.weights import PROBED_ROWS, check_probe, is_finite, probe_lm_head

# Checkpoint name of a weight -> the fused parameter that holds it, and its share of that.
_FUSED: dict[str, tuple[str, str | int]] = {
    ".q_proj.": (".qkv_proj.", "q"),
    ".k_proj.": (".qkv_proj.", "k"),
    ".v_proj.": (".qkv_proj.", "v"),
    ".gate_proj.": (".gate_up_proj.", 0),
    ".up_proj.": (".gate_up_proj.", 1),
    ".k.": (".kv.", 0),
    ".v.": (".kv.", 1),
}


class RowSlice(nn.Module):
    """Some rows of the target's lm_head, the same on every rank, in the layout of fast small GEMMs."""

    def __init__(self, weight: torch.Tensor, int8: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        self.cpu_linear: Any = F.linear
        if int8:
            self.cpu_linear = Int8Linear(weight)
            self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        elif current_platform.is_cpu():
            dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.cpu_linear(x, self.weight, None)
        return logits


class SharedLmHead(nn.Module):
    """The target's lm_head, by reference, as the head reads it: rows as embeddings, logits, best tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vocab = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size)
        self.register_buffer("draft_vocab", vocab, persistent=False)
        self.draft_vocab: torch.Tensor | None
        # The target's; plain attributes, so that they do not count as the head's own weights.
        self._lm_head: VocabParallelEmbedding | None = None
        self._draft_head: RowSlice | None = None
        self._logits_processor = LogitsProcessor(config.vocab_size)

    def bind(self, lm_head: VocabParallelEmbedding, int8: bool = False) -> None:
        """Read this lm_head from now on, and slice its draft-vocabulary rows, in int8 if that is wanted."""
        object.__setattr__(self, "_lm_head", lm_head)
        if self.draft_vocab is not None:
            object.__setattr__(self, "_draft_head", RowSlice(self.embed(self.draft_vocab), int8))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Unscaled lm_head rows of token ids [N], [N, D], whichever ranks hold them."""
        lm_head = self._lm_head
        assert lm_head is not None, "bind first"
        if lm_head.tp_size == 1:
            return F.embedding(tokens, lm_head.weight)
        first = lm_head.shard_indices.org_vocab_start_index
        here = (tokens >= first) & (tokens < lm_head.shard_indices.org_vocab_end_index)
        rows = F.embedding(torch.where(here, tokens - first, 0), lm_head.weight)
        return tensor_model_parallel_all_reduce(rows * here[:, None])

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits over the draft vocabulary, [N, draft V], of states [N, D]."""
        if self._draft_head is not None:
            return self._draft_head(states)
        assert self._lm_head is not None, "bind first"
        return self._logits_processor(self._lm_head, states)

    def candidates(self, states: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Best tokens: float32 [N, K] log-probabilities, falling, and int64 [N, K] token ids."""
        return self.best(self.compute_logits(states), num_candidates)

    def best(self, logits: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, of logits over the draft vocabulary, [N, draft V]."""
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        best, index = log_probs.topk(min(num_candidates, log_probs.shape[-1]), dim=-1)
        return best, index if self.draft_vocab is None else self.draft_vocab[index]


class TreeHead(nn.Module, ABC):
    """A head as a vLLM model.

    It reads accepted positions in order (`forward`), and then drafts from some of them: a node has a state, a row of
    S numbers that only the head understands, and its children's candidates and states follow from it.

    Attributes:
        title: of the method, in sentences.
        num_candidates: K, children considered per node.
        max_rows: that its modules are compiled for.
        width: numbers that `forward` reads of the target per position.

    Raises:
        UserError: the checkpoint lacks weights, or does not fit the ranks or the target.
    """

    title: ClassVar[str]

    def __init__(self, vllm_config: VllmConfig) -> None:
        super().__init__()
        assert vllm_config.speculative_config is not None
        self.config: Any = vllm_config.speculative_config.draft_model_config.hf_config
        self.shared = SharedLmHead(self.config)
        options: CloverOptions = vllm_config.speculative_config.clover
        self.num_candidates = options.candidates(vllm_config.speculative_config.num_speculative_tokens)
        self.max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.width = (1 + len(getattr(self.config, "target_layers", ()))) * self.config.hidden_size
        self._in_int8 = is_int8_quicker(options.head_precision, vllm_config.model_config.dtype)
        self._int8: dict[nn.Module, Int8Linear] = {}

    @abstractmethod
    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Read new positions; whatever the head keeps of them is written to the cache.

        Args:
            positions: int64 [N].
            hidden: [N, `width`], the target's pre-norm hidden states h_t, behind those of other layers.
            embeds: [N, D], from `embed`, of the tokens at t + 1.

        Returns:
            what drafting starts from at each of them, [N, D].
        """

    def root_states(self, rows: torch.Tensor) -> torch.Tensor:
        """States of roots, [R, S], from their rows of `forward`, [R, D]."""
        return rows

    @abstractmethod
    def first(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Best tokens behind roots with states [R, S].

        Returns:
            float32 [R, K] log-probabilities, falling, and int64 [R, K] token ids.
        """

    @abstractmethod
    def expand(
        self, states: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step states [N, S] on by tokens [N].

        Returns:
            the next states, and the best tokens behind them as `first` does.
        """

    def own_name(self, name: str) -> str:
        """The parameter that a tensor of a checkpoint goes to, before any is fused with others."""
        return name

    def checkpoint_name(self, name: str) -> str:
        """The reverse of `own_name`."""
        return name

    def bind_target(self, target: nn.Module) -> None:
        """Share the target's lm_head, and slice its draft-vocabulary rows once.

        Raises:
            UserError: the lm_head has no plain weight (it is quantised), not the head's size, or is
                another model's.
        """
        language_model = language_model_of(target)
        lm_head = getattr(language_model, "lm_head", None)
        if not isinstance(lm_head, VocabParallelEmbedding):
            raise UserError(f"{self.title} needs the target's lm_head, which {type(target).__name__} lacks.")
        weight = getattr(lm_head, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise UserError(
                f"{self.title} needs an lm_head that is not quantised; serve the target with one."
            )
        if weight.shape[1] != self.config.hidden_size or lm_head.org_vocab_size < self.config.vocab_size:
            raise UserError(
                f"The {self.title} head was trained for an lm_head of {self.config.vocab_size} x "
                f"{self.config.hidden_size}; the target's is {lm_head.org_vocab_size} x {weight.shape[1]}."
            )
        self.shared.bind(lm_head, self._in_int8)
        for layer, linear in self._int8.items():
            object.__setattr__(layer, "cpu_linear", linear)
        self._int8 = {}
        probed = torch.linspace(0, self.config.vocab_size - 1, PROBED_ROWS).long()
        check_probe(self.config, probe_lm_head(self.embed(probed.to(weight.device)).cpu()))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `SharedLmHead.embed`."""
        return self.shared.embed(tokens)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As `SharedLmHead.compute_logits`; vLLM asks draft models for it."""
        return self.shared.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint whose names are the reference model's.

        Raises:
            UserError: a weight is missing, unknown or not finite.
        """
        parameters = dict(self.named_parameters())
        known = set(self._checkpoint_names(parameters))
        if self.shared.draft_vocab is not None:
            known.add("draft_vocab")
        wanted = set(known)
        loaded: set[str] = set()
        for name, tensor in weights:
            if name not in known:
                raise UserError(
                    f"The {self.title} checkpoint holds {name}, which its configuration has no place for."
                )
            wanted.discard(name)
            if name == "draft_vocab":
                assert self.shared.draft_vocab is not None
                if tensor.shape != self.shared.draft_vocab.shape or not _are_tokens(
                    tensor, self.config.vocab_size
                ):
                    raise UserError(
                        f"The {self.title} checkpoint's draft_vocab must be {len(self.shared.draft_vocab)} token ids below "
                        f"{self.config.vocab_size}."
                    )
                self.shared.draft_vocab.copy_(tensor)
                continue
            if not is_finite(tensor):
                raise UserError(f"The {self.title} checkpoint's weight {name} is not finite.")
            own = self.own_name(name)
            share: str | int | None = None
            for part, (fused, index) in _FUSED.items():
                if part in own:
                    own, share = own.replace(part, fused), index
                    break
            parameter = parameters[own]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            if share is None:
                loader(parameter, tensor)
            else:
                loader(parameter, tensor, share)
            loaded.add(own)
        if wanted:
            raise UserError(
                f"The {self.title} checkpoint lacks {len(wanted)} weights, {min(wanted)} for one."
            )
        if self._in_int8:
            self._int8 = int8_linears(self)
        return loaded

    def _checkpoint_names(self, parameters: Iterable[str]) -> Iterator[str]:
        for name in parameters:
            plain = self.checkpoint_name(name)
            parts = [part for part, (fused, _) in _FUSED.items() if fused in plain]
            for part in parts:
                yield plain.replace(_FUSED[part][0], part)
            if not parts:
                yield plain


def _are_tokens(tensor: torch.Tensor, vocab_size: int) -> bool:
    return not tensor.is_floating_point() and bool(((tensor >= 0) & (tensor < vocab_size)).all())


def joined(hidden_states: list[torch.Tensor]) -> torch.Tensor:
    """What a head reads of the target, side by side, from the states of its layers, each [N, D]."""
    return torch.cat(hidden_states, dim=-1) if len(hidden_states) > 1 else hidden_states[0]


def language_model_of(target: nn.Module) -> Any:
    """The part of a target that says tokens."""
    return cast(Any, target).get_language_model() if supports_multimodal(target) else target


def check_ranks(config: Any, title: str) -> None:
    """Refuse a head whose attention heads cannot be split over the ranks.

    Raises:
        UserError: they cannot.
    """
    ranks = get_tensor_model_parallel_world_size()
    if config.num_attention_heads % ranks:
        raise UserError(
            f"The {title} head has {config.num_attention_heads} attention heads, which "
            f"{ranks} tensor-parallel ranks cannot share equally."
        )
