"""`clover-vllm eval`: tokens per step of a head, as an engine that verifies trees would accept.

The target's greedy answer is known, so what it would emit at an accepted node is known too: the
answer's next token. Drafting starts at a position from the target's hidden state there and then
uses the head's own predictions only. Trees are drafted for all positions of an answer at once; the
walk then visits those at which a real engine would have started a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import make_folder
from clover_vllm.base.progress import each
from clover_vllm.eval.settings import EvalSettings
from clover_vllm.heads.base import DraftTables, Head, Prefix
from clover_vllm.heads.registry import kind_of
from clover_vllm.heads.weights import check_target
from clover_vllm.target.frozen import FrozenTarget
from clover_vllm.train.answers import read_answers
from clover_vllm.tree import (
    PUBLISHED_25,
    Cutoffs,
    Drafter,
    Tree,
    chain,
    grow_best_first,
    grow_fixed,
    walk,
)


class Grow(Protocol):
    """Makes trees from a drafter."""

    def __call__(self, drafter: Drafter) -> list[Tree]: ...


@dataclass(frozen=True)
class Growth:
    """A named way to grow trees."""

    name: str
    grow: Grow


def best_first(
    num_nodes: int, rounds: int | None = None, width: int | None = None, cutoffs: Cutoffs | None = None
) -> Growth:
    """Best-first trees of `num_nodes`: by default 6 rounds (8 from 16 nodes on), half as wide.

    That is more drafting than pays in an engine (`engine.options`): it shows what the head knows.
    """
    rounds = rounds or (6 if num_nodes < 16 else 8)
    width = width or max(2, num_nodes // 2)
    return Growth(
        f"tree of {num_nodes}",
        lambda drafter: grow_best_first(drafter, num_nodes, rounds, width, cutoffs=cutoffs),
    )


def default_growths() -> list[Growth]:
    """Those that the model card reports."""
    return [
        Growth("chain of 5", lambda drafter: grow_fixed(drafter, chain(5))),
        *(best_first(n) for n in (4, 8, 16, 25)),
        Growth("published 25", lambda drafter: grow_fixed(drafter, PUBLISHED_25)),
    ]


@dataclass(frozen=True)
class Answer:
    """A greedy answer of the target."""

    category: str
    prompt_ids: torch.Tensor  # int64 [P]
    answer_ids: torch.Tensor  # int64 [A]


@dataclass
class Replay:
    """The steps in which an engine would have said one answer (filled by `replay`)."""

    category: str
    tokens: int  # emitted by verifying steps, bonus included; prefill's token is not counted
    steps: int
    accepted: list[int]  # steps that accepted a node at depth 1, 2, ...

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps


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
        head: Head,
        draft_vocab: torch.Tensor | None = None,
        chunk_elements: int | None = None,
    ) -> None:
        """
        Args:
            target: that said the answers.
            head: on any device; moved to the target's.
            draft_vocab: int64, for a head whose checkpoint has no place for it, as EAGLE-1's.
            chunk_elements: about the most logits held at once; by default what a CPU's cache holds,
                or 64 Mi on a GPU.

        Raises:
            UserError: fewer than 8 tokens can be drafted.
        """
        self.target = target
        self.head = head.eval().to(target.device)
        if head.saves_draft_vocab:
            draft_vocab = head.draft_vocab
        if draft_vocab is not None and len(draft_vocab) < 8:
            raise UserError("A draft vocabulary of fewer than 8 tokens is too small to evaluate.")
        draft_vocab = None if draft_vocab is None else draft_vocab.to(target.device)
        rows = target.lm_head if draft_vocab is None else target.lm_head[draft_vocab]
        # In the target's dtype, as an engine scores.
        self.tables = DraftTables(head.embeddings_of(target), rows, draft_vocab)
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
        hidden = self.target.hidden_states(ids[None], self.head.target_layers)
        self.target.check_finite(hidden)
        post_norm = self.target.norm(hidden[..., -self.target.config.hidden_size :])[0, :-1]
        said = (post_norm[first:] @ self.target.lm_head.T).argmax(dim=-1)
        embeds = F.embedding(ids[1:], self.tables.embed).float()
        rows = torch.arange(first, len(ids) - 1, device=ids.device)
        make = self.head.drafters(Prefix(hidden[0, :-1].float(), post_norm.float(), embeds), self.tables)
        return Prepared(
            category=answer.category,
            continuation=ids[first + 2 :],
            positions=len(ids) - 1 - first,
            new_drafter=lambda part: make(rows[part]),
            agreement=(said == ids[first + 1 :]).float().mean().item(),
        )

    @torch.no_grad()
    def trees(self, prepared: Prepared, growth: Growth) -> list[Tree]:
        """A tree for every position of an answer; drafted in chunks of positions."""
        made: list[Tree] = []
        for start in range(0, prepared.positions, self._chunk):
            part = slice(start, min(start + self._chunk, prepared.positions))
            made += growth.grow(prepared.new_drafter(part))
        return made

    def replay(self, answer: Answer, growths: Sequence[Growth]) -> list[Replay]:
        """Replays of one answer of at least two tokens, with every growth."""
        prepared = self.prepare(answer)
        continuation = prepared.continuation.tolist()
        return [replay(self.trees(prepared, growth), continuation, answer.category) for growth in growths]

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


def accepted_nodes(tree: Tree, continuation: Sequence[int]) -> list[int]:
    """What the target accepts of a tree.

    Args:
        tree: drafted behind the token before `continuation`.
        continuation: how the answer goes on; past its end the target says nothing.
    """
    said = [continuation[d] if d < len(continuation) else -1 for d in (0, *tree.depths)]
    return walk(tree, said)


def replay(trees: Sequence[Tree], continuation: Sequence[int], category: str) -> Replay:
    """Follow one answer: which steps an engine takes, and what each accepts.

    Args:
        trees: by position; tree r is drafted r tokens into `continuation`.
        continuation: the answer's tokens after its first.
        category: of the answer.
    """
    taken = [0] * max((depth for tree in trees for depth in tree.depths), default=0)
    position = steps = tokens = 0
    while position < len(continuation):
        steps += 1
        accepted = len(accepted_nodes(trees[position], continuation[position:]))
        for d in range(accepted):
            taken[d] += 1
        emitted = min(accepted + 1, len(continuation) - position)
        tokens += emitted
        position += emitted
    return Replay(category, tokens, steps, taken)


def evaluate(settings: EvalSettings) -> dict[str, dict[str, list[Replay]]]:
    """Measure heads on the greedy answers of a target.

    Returns:
        replays, one per answer, by head folder, then by name of growth.

    Raises:
        UserError: anything that the user can mend, before the target is loaded where possible.
    """
    settings.check()
    output = settings.output
    if output is not None:  # a folder that cannot be made is refused before anything is measured
        make_folder(output.parent if output.suffix == ".json" else output)
    heads = {str(folder): load_any_head(folder) for folder in settings.head}
    vocab = _draft_vocab(settings.draft_vocab_of) if settings.draft_vocab_of else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    target = FrozenTarget(settings.target, getattr(torch, settings.dtype), device)
    for head in heads.values():
        check_target(head.config, target.config, target.lm_head)
    answers = greedy_answers(settings.answers, target, settings.limit, settings.sources)
    growths = [best_first(n) for n in settings.nodes] if settings.nodes else default_growths()
    results: dict[str, dict[str, list[Replay]]] = {}
    for name, head in heads.items():
        evaluator = Evaluator(target, head, vocab)
        evaluator.check_answers(answers)
        results[name] = {growth.name: [] for growth in growths}
        for answer in each(answers, "answers", f"drafting with {Path(name).name}"):
            for growth, found in zip(growths, evaluator.replay(answer, growths), strict=True):
                results[name][growth.name].append(found)
    return results


def load_any_head(folder: Path) -> Head:
    """A head of any method that `heads.registry` knows.

    Raises:
        UserError: it is none, or damaged.
    """
    return kind_of(folder).head_class().load(folder)


def _draft_vocab(folder: Path) -> torch.Tensor | None:
    head = load_any_head(folder)
    if not head.saves_draft_vocab:
        raise UserError(f"--draft-vocab-of {folder} holds no draft vocabulary; give a Clover-2 head.")
    return head.draft_vocab


def greedy_answers(
    paths: Sequence[Path], target: FrozenTarget, limit: int | None, sources: Collection[str] = ()
) -> list[Answer]:
    """The greedy answers of two tokens or more in answer files, in their order.

    Args:
        paths: the files.
        target: whose answers they are.
        limit: most answers.
        sources: theirs; empty: any.

    Raises:
        UserError: unreadable, or there is none.
    """
    context = int(target.config.max_position_embeddings)
    rows = read_answers(paths, int(target.config.vocab_size), context)
    of = list(map(str, rows.rows["source"]))
    if unknown := sorted(set(sources) - set(of)):
        raise UserError(f"No answer is of the source {unknown[0]!r}; there are {', '.join(sorted(set(of)))}.")
    answers: list[Answer] = []
    for i, temperature in enumerate(rows.rows["temperature"]):
        if temperature == 0 and rows.answer_lengths[i] >= 2:
            prompt, answer = rows.sequence(i)
            if sources and of[i] not in sources:
                continue
            answers.append(Answer(of[i], torch.from_numpy(prompt), torch.from_numpy(answer)))
            if limit is not None and len(answers) >= limit:
                break
    if not answers:
        raise UserError(
            f"{paths[0]} holds no greedy answer of two tokens or more{' of these sources' if sources else ''}; make some with "
            "`clover-vllm data --held-out --greedy-share 1`."
        )
    return answers
