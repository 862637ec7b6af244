"""`clover-vllm eval`: tokens per step of a head, as an engine that verifies trees would accept.

The target's greedy answer is known, so what it would emit at an accepted node is known too: the
answer's next token. Drafting starts at a position from the target's hidden state there and then
uses the head's own predictions only. Trees are drafted for all positions of an answer at once; the
walk then visits those at which a real engine would have started a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from clover_vllm.base.errors import UserError
from clover_vllm.base.progress import each
from clover_vllm.heads.checkpoint import check_target, load_head, read_config
from clover_vllm.heads.clover2.model import Clover2DraftModel, DecoderLayer
from clover_vllm.heads.eagle1.model import Eagle1DraftModel, load_eagle1
from clover_vllm.target.frozen import FrozenTarget
from clover_vllm.train.answers import read_answers
from clover_vllm.tree import (
    PUBLISHED_25,
    Cutoffs,
    Drafter,
    DraftTrees,
    chain,
    grow_best_first,
    grow_static,
    walk,
)


class Grow(Protocol):
    """Makes trees from a drafter."""

    def __call__(self, drafter: Drafter) -> DraftTrees: ...


@dataclass(frozen=True)
class Shape:
    """A named way to grow trees."""

    name: str
    grow: Grow


def best_first(
    num_nodes: int, rounds: int | None = None, width: int | None = None, cutoffs: Cutoffs | None = None
) -> Shape:
    """Best-first trees of `num_nodes`: by default 6 rounds (8 from 16 nodes on), half as wide.

    That is more drafting than pays in an engine (`engine.options`): it shows what the head knows.
    """
    rounds = rounds or (6 if num_nodes < 16 else 8)
    width = width or max(2, num_nodes // 2)
    return Shape(
        f"tree of {num_nodes}",
        lambda drafter: grow_best_first(drafter, num_nodes, rounds, width, cutoffs=cutoffs),
    )


def default_shapes() -> list[Shape]:
    """The shapes that the model card reports."""
    return [
        Shape("chain of 5", lambda drafter: grow_static(drafter, chain(5))),
        *(best_first(n) for n in (4, 8, 16, 25)),
        Shape("published 25", lambda drafter: grow_static(drafter, PUBLISHED_25)),
    ]


@dataclass(frozen=True)
class Answer:
    """A greedy answer of the target."""

    category: str
    prompt_ids: torch.Tensor  # int64 [P]
    answer_ids: torch.Tensor  # int64 [A]


@dataclass
class Outcome:
    """What drafting over one answer gave (filled by `measure`)."""

    category: str
    tokens: int  # emitted by verifying steps, bonus included; prefill's token is not counted
    steps: int
    accepted: list[int]  # steps that accepted a node at depth 1, 2, ...

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps


class Clover2Drafter:
    """Drafts from many positions at once with the reference Clover-2 head."""

    def __init__(
        self, head: Clover2DraftModel, g: torch.Tensor, embed: torch.Tensor, draft_head: torch.Tensor
    ) -> None:
        """
        Args:
            head: the reference model.
            g: [R, D], augmenting outputs of the positions to draft from.
            embed: [V, D], the target's lm_head, as embeddings.
            draft_head: [draft V, D], its rows that are scored.
        """
        self._head = head
        self._embed = embed
        self._draft_head = draft_head
        self._states = g[:, None]
        self._g = g

    def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._score(self._head.first(self._g), num_candidates)

    def expand(
        self, parent_slots: torch.Tensor, tokens: torch.Tensor, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = parent_slots[..., None].expand(*parent_slots.shape, self._states.shape[-1])
        embeds = F.embedding(tokens, self._embed).to(self._states.dtype)
        r, s = self._head.advance(self._states.gather(1, index), embeds)
        self._states = torch.cat([self._states, r], dim=1)
        return self._score(s, num_candidates)

    def _score(self, s: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        return score_candidates(s, self._draft_head, self._head.draft_vocab, num_candidates)


def score_candidates(
    states: torch.Tensor,
    draft_head: torch.Tensor,
    draft_vocab: torch.Tensor | None,
    num_candidates: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best tokens by lm_head.

    Args:
        states: [..., D], normed states.
        draft_head: [draft V, D].
        draft_vocab: int64 [draft V], token ids of its rows, or None for all.
        num_candidates: K, or all where there are fewer.

    Returns:
        float32 [..., K] log-probabilities, falling, and int64 [..., K] token ids.
    """
    logits = (states.to(draft_head.dtype) @ draft_head.T).float()
    best, index = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
    log_probs = best - logits.logsumexp(dim=-1, keepdim=True)
    return log_probs, index if draft_vocab is None else draft_vocab[index]


@dataclass
class Eagle1Prefix:
    """An EAGLE-1 head's work on a known sequence, shared by all drafters on it (filled by `of`)."""

    keys: torch.Tensor  # [kv heads, T, K]
    values: torch.Tensor  # [kv heads, T, K]
    features: torch.Tensor  # [T, D], predicted

    @classmethod
    def of(cls, head: Eagle1DraftModel, features: torch.Tensor, embeds: torch.Tensor) -> Eagle1Prefix:
        """features: [T, D], post-norm states; embeds: [T, D], of the tokens one further on."""
        cache = head.new_cache()
        out = head(features[None], embeds[None], cache)[0]
        keys, values = cache[0].keys, cache[0].values
        assert keys is not None
        assert values is not None
        return cls(keys[0], values[0], out)


class Eagle1Drafter:
    """Drafts from many positions of one sequence at once with an EAGLE-1 head.

    A node's key and value join those of the positions up to its root, and of its own path.
    """

    def __init__(
        self,
        head: Eagle1DraftModel,
        prefix: Eagle1Prefix,
        rows: torch.Tensor,
        embed: torch.Tensor,
        draft_head: torch.Tensor,
        draft_vocab: torch.Tensor | None,
    ) -> None:
        """
        Args:
            head: the reference model.
            prefix: its work on the sequence.
            rows: int64 [R], positions to draft from.
            embed: [V, D], the target's token embeddings.
            draft_head: [draft V, D], lm_head rows that are scored.
            draft_vocab: int64 [draft V], or None for all.
        """
        self._head = head
        self._embed = embed
        self._draft_head = draft_head
        self._draft_vocab = draft_vocab
        self._keys, self._values = prefix.keys, prefix.values
        self._rows = rows
        self._features = prefix.features[rows, None]  # [R, slots, D]
        requests = len(rows)
        # Slots' own keys and values, and which slots lie on a slot's path (the root adds nothing:
        # its key is among the prefix's).
        self._slot_keys = self._keys.new_zeros(requests, self._keys.shape[0], 1, self._keys.shape[2])
        self._slot_values = torch.zeros_like(self._slot_keys)
        self._paths = torch.zeros(requests, 1, 1, dtype=torch.bool, device=rows.device)
        self._depths = torch.zeros(requests, 1, dtype=torch.int64, device=rows.device)

    def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._score(self._features[:, 0], num_candidates)

    def expand(
        self, parent_slots: torch.Tensor, tokens: torch.Tensor, num_candidates: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        requests, w = parent_slots.shape
        old = self._features.shape[1]
        index = parent_slots[..., None].expand(requests, w, self._features.shape[-1])
        embeds = F.embedding(tokens, self._embed).to(self._features.dtype)
        x = self._head.fc(torch.cat([embeds, self._features.gather(1, index)], dim=-1))
        depths = self._depths.gather(1, parent_slots) + 1
        layer = self._head.layers[0]
        assert isinstance(layer, DecoderLayer)
        attention = layer.self_attn
        cos, sin = self._head.rotary(self._rows[:, None] + depths)
        q, k, v = attention.project(x, cos, sin)
        slots = torch.arange(old, old + w, device=tokens.device)
        own = F.one_hot(slots, old + w).bool().expand(requests, w, old + w)
        parent_paths = F.pad(self._paths.gather(1, parent_slots[..., None].expand(requests, w, old)), (0, w))
        paths = parent_paths | own
        self._slot_keys = torch.cat([self._slot_keys, k], dim=2)
        self._slot_values = torch.cat([self._slot_values, v], dim=2)
        self._paths = torch.cat([F.pad(self._paths, (0, w)), paths], dim=1)
        self._depths = torch.cat([self._depths, depths], dim=1)
        positions = torch.arange(self._keys.shape[1], device=tokens.device)
        prefix = (positions <= self._rows[:, None])[:, None]
        mask = torch.cat([prefix.expand(-1, w, -1), paths], dim=2)[:, None]
        keys = torch.cat([self._keys.expand(requests, *self._keys.shape), self._slot_keys], dim=2)
        values = torch.cat([self._values.expand(requests, *self._values.shape), self._slot_values], dim=2)
        x = x + attention.attend(q, keys, values, mask)
        out = x + layer.mlp(layer.post_attention_layernorm(x))
        self._features = torch.cat([self._features, out], dim=1)
        return self._score(out, num_candidates)

    def _score(self, s: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        return score_candidates(s, self._draft_head, self._draft_vocab, num_candidates)


@dataclass
class Prepared:
    """An answer with all that drafting over it needs (filled by `Evaluator.prepare`)."""

    category: str
    continuation: torch.Tensor  # int64 [R], tokens after the first answer token
    positions: int  # R, positions that a step can start from
    new_drafter: Callable[[slice], Drafter]  # for some of the positions
    agreement: float  # share of the answer that is the target's most likely token


class Evaluator:
    """Measures heads on greedy answers of one target."""

    def __init__(
        self,
        target: FrozenTarget,
        head: Clover2DraftModel | Eagle1DraftModel,
        draft_vocab: torch.Tensor | None = None,
        chunk_elements: int | None = None,
    ) -> None:
        """
        Args:
            target: that said the answers.
            head: on any device; moved to the target's.
            draft_vocab: int64, for EAGLE-1, whose checkpoint has none; a Clover-2 head brings its own.
            chunk_elements: about the most logits held at once; by default what a CPU's cache holds,
                or 64 Mi on a GPU.

        Raises:
            UserError: fewer than 8 tokens can be drafted.
        """
        self.target = target
        self.head = head.eval().to(target.device)
        if isinstance(head, Clover2DraftModel):
            draft_vocab = head.draft_vocab
        if draft_vocab is not None and len(draft_vocab) < 8:
            raise UserError("A draft vocabulary of fewer than 8 tokens is too small to evaluate.")
        self.draft_vocab = None if draft_vocab is None else draft_vocab.to(target.device)
        rows = target.lm_head if self.draft_vocab is None else target.lm_head[self.draft_vocab]
        self.draft_head = rows  # in the target's dtype, as an engine scores
        clover = isinstance(head, Clover2DraftModel)
        self.embed = target.lm_head if clover else target.embed_tokens
        # A round expands a dozen nodes per position.
        if chunk_elements is None:
            chunk_elements = 1 << (22 if target.device.type == "cpu" else 26)
        self._chunk = max(1, chunk_elements // (12 * len(rows)))

    @torch.no_grad()
    def prepare(self, answer: Answer) -> Prepared:
        """Run the target and the head's causal part over an answer of at least two tokens.

        Steps can start from the last prompt position (after prefill has emitted the first answer
        token) up to the one before the last token.

        Raises:
            UserError: the target's hidden states are not finite.
        """
        ids = torch.cat([answer.prompt_ids, answer.answer_ids]).to(self.target.device)
        first = len(answer.prompt_ids) - 1
        hidden = self.target.hidden_states(ids[None])
        self.target.check_finite(hidden)
        post_norm = self.target.norm(hidden)[0, :-1]
        said = (post_norm[first:] @ self.target.lm_head.T).argmax(dim=-1)
        embeds = F.embedding(ids[1:], self.embed).float()
        return Prepared(
            category=answer.category,
            continuation=ids[first + 2 :],
            positions=len(ids) - 1 - first,
            new_drafter=self._drafter_factory(hidden[0, :-1].float(), post_norm.float(), embeds, first),
            agreement=(said == ids[first + 1 :]).float().mean().item(),
        )

    def _drafter_factory(
        self, hidden: torch.Tensor, post_norm: torch.Tensor, embeds: torch.Tensor, first: int
    ) -> Callable[[slice], Drafter]:
        if isinstance(self.head, Eagle1DraftModel):
            eagle, prefix = self.head, Eagle1Prefix.of(self.head, post_norm, embeds)
            rows = torch.arange(first, len(hidden), device=hidden.device)
            return lambda part: Eagle1Drafter(
                eagle, prefix, rows[part], self.embed, self.draft_head, self.draft_vocab
            )
        clover = self.head
        g = clover.augment(hidden[None], embeds[None])[0, first:]
        return lambda part: Clover2Drafter(clover, g[part], self.embed, self.draft_head)

    @torch.no_grad()
    def trees(self, prepared: Prepared, shape: Shape) -> DraftTrees:
        """A tree for every position of an answer, on the CPU; drafted in chunks of positions."""
        parts = []
        for start in range(0, prepared.positions, self._chunk):
            part = slice(start, min(start + self._chunk, prepared.positions))
            parts.append(shape.grow(prepared.new_drafter(part)).to("cpu"))
        return DraftTrees.concatenate(parts)

    def measure(self, answer: Answer, shapes: Sequence[Shape]) -> list[Outcome]:
        """Outcome of every shape over one answer of at least two tokens."""
        prepared = self.prepare(answer)
        continuation = prepared.continuation.cpu()
        return [outcome_of(self.trees(prepared, shape), continuation, answer.category) for shape in shapes]

    def check_answers(self, answers: Sequence[Answer]) -> None:
        """Refuse answers that the target would not have given.

        bfloat16 differs between engines in near ties, so a few tokens in a hundred may differ.

        Raises:
            UserError: they are another model's, or were not greedy.
        """
        agreements = [self.prepare(answer).agreement for answer in answers[:8]]
        agreement = sum(agreements) / len(agreements)
        if agreement < 0.9:
            raise UserError(
                f"Only {agreement:.0%} of the answers' tokens are what target {self.target.path} says; "
                "they are another model's, or were not generated greedily."
            )


def emitted_tokens(trees: DraftTrees, continuation: torch.Tensor) -> torch.Tensor:
    """What the target emits at every row, where the row lies on the answer's path.

    Args:
        trees: request r starts r tokens into `continuation`.
        continuation: int64 [C], R <= C + 1; past its end nothing is emitted (-1).

    Returns:
        int64 [N + R], root row before node rows (see `tree.walk`).
    """
    request = trees.request_of_node
    index = torch.empty(len(trees.tokens) + trees.num_requests, dtype=torch.int64)
    roots = trees.offsets[:-1] + torch.arange(trees.num_requests)
    index[roots] = torch.arange(trees.num_requests)
    nodes = torch.arange(len(trees.tokens)) + request + 1
    index[nodes] = request + trees.depths
    padded = torch.cat([continuation, torch.full((int(index.max()) + 1,), -1)])
    return padded[index]


def outcome_of(trees: DraftTrees, continuation: torch.Tensor, category: str) -> Outcome:
    """Follow one answer: which steps an engine takes, and what each accepts."""
    accepted = walk(trees, emitted_tokens(trees, continuation)).lengths.tolist()
    depth = int(trees.depths.max()) if len(trees.depths) else 0
    taken = [0] * depth
    position = steps = tokens = 0
    while position < len(continuation):
        steps += 1
        for d in range(depth):
            taken[d] += accepted[position] > d
        emitted = min(accepted[position] + 1, len(continuation) - position)
        tokens += emitted
        position += emitted
    return Outcome(category, tokens, steps, taken)


@dataclass
class EvalSettings:
    """What `clover-vllm eval` was asked for."""

    target: str
    heads: list[Path]
    answers: list[Path]
    nodes: list[int] | None = None  # best-first trees of these sizes, instead of the default shapes
    limit: int | None = None
    draft_vocab_of: Path | None = None  # EAGLE-1 heads draft from this Clover-2 head's vocabulary
    dtype: str = "bfloat16"


def evaluate(settings: EvalSettings) -> dict[str, dict[str, list[Outcome]]]:
    """Measure heads on the greedy answers of a target.

    Returns:
        outcomes per answer, by head folder, then by shape name.

    Raises:
        UserError: anything that the user can mend, before the target is loaded where possible.
    """
    if settings.nodes is not None and min(settings.nodes) < 1:
        raise UserError("--nodes must be 1 or more.")
    if settings.limit is not None and settings.limit < 1:
        raise UserError(f"--limit {settings.limit} must be 1 or more.")
    if settings.dtype not in ("bfloat16", "float32"):
        raise UserError(f"--dtype {settings.dtype} is not supported; use bfloat16 or float32.")
    heads = {str(folder): load_any_head(folder) for folder in settings.heads}
    vocab = load_head(settings.draft_vocab_of).draft_vocab if settings.draft_vocab_of else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = FrozenTarget(settings.target, getattr(torch, settings.dtype), device)
    for head in heads.values():
        check_target(head.config, target.config, target.lm_head)
    answers = greedy_answers(settings.answers, target, settings.limit)
    shapes = default_shapes() if settings.nodes is None else [best_first(n) for n in settings.nodes]
    results: dict[str, dict[str, list[Outcome]]] = {}
    for name, head in heads.items():
        evaluator = Evaluator(target, head, vocab)
        evaluator.check_answers(answers)
        results[name] = {shape.name: [] for shape in shapes}
        for answer in each(answers, "answers", f"drafting with {Path(name).name}"):
            for shape, outcome in zip(shapes, evaluator.measure(answer, shapes), strict=True):
                results[name][shape.name].append(outcome)
    return results


def load_any_head(folder: Path) -> Clover2DraftModel | Eagle1DraftModel:
    """A Clover-2 head, or an EAGLE-1 head in vLLM's form.

    Raises:
        UserError: neither, or damaged.
    """
    if read_config(folder).get("model_type") == "llama":
        return load_eagle1(folder)
    return load_head(folder)


def greedy_answers(paths: Sequence[Path], target: FrozenTarget, limit: int | None) -> list[Answer]:
    """The greedy answers of two tokens or more in answer files, in their order.

    Raises:
        UserError: unreadable, or there is none.
    """
    context = int(target.config.max_position_embeddings)
    rows = read_answers(paths, int(target.config.vocab_size), context)
    answers: list[Answer] = []
    for i, temperature in enumerate(rows.rows["temperature"]):
        if temperature == 0 and rows.answer_lengths[i] >= 2:
            prompt, answer = rows.sequence(i)
            source = str(rows.rows[i]["source"])
            answers.append(Answer(source, torch.from_numpy(prompt), torch.from_numpy(answer)))
            if limit is not None and len(answers) >= limit:
                break
    if not answers:
        raise UserError(
            f"{paths[0]} holds no greedy answer of two tokens or more; make some with "
            "`clover-vllm data --held-out --greedy-share 1`."
        )
    return answers
