"""Offline evaluation equals drafting and verifying one step after the other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small import one_sentence, write_answers

from clover_vllm.base.errors import UserError
from clover_vllm.eval.evaluate import (
    Answer,
    Evaluator,
    Growth,
    Prepared,
    best_first,
    default_growths,
    greedy_answers,
)
from clover_vllm.heads.base import Head
from clover_vllm.heads.clover1.config import Clover1Config
from clover_vllm.heads.clover1.init import init_from_target
from clover_vllm.heads.clover1.model import Clover1DraftModel
from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.init import config_for_target
from clover_vllm.heads.eagle1.model import Eagle1DraftModel
from clover_vllm.heads.medusa.config import MedusaTreesConfig
from clover_vllm.heads.medusa.model import MedusaTreesDraftModel
from clover_vllm.target.frozen import FrozenTarget
from clover_vllm.tree import ROOT, Tree, chain, grow_fixed

KINDS = ["clover", "clover1", "medusa", "eagle"]
SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_hidden_layers", "num_heads", "vocab_size", "rms_norm_eps", "rope_parameters", "max_position_embeddings",
)  # fmt: skip


@pytest.fixture
def clover(fitting_head: Clover2DraftModel) -> Clover2DraftModel:
    torch.manual_seed(3)
    for parameter in fitting_head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return fitting_head


@pytest.fixture
def eagle(frozen: FrozenTarget) -> Eagle1DraftModel:
    torch.manual_seed(4)
    return Eagle1DraftModel(config_for_target(frozen.config)).eval()


@pytest.fixture(scope="module")
def answers(frozen: FrozenTarget, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    path = write_answers(tmp_path_factory.mktemp("a") / "a.jsonl", frozen, 6, seed=5)
    return greedy_answers([path], frozen, None)


@pytest.fixture
def clover1(frozen: FrozenTarget) -> Clover1DraftModel:
    torch.manual_seed(5)
    config = config_for_target(frozen.config).to_dict() | {"num_hidden_layers": 1, "num_heads": 3}
    head = Clover1DraftModel(Clover1Config(**{k: config[k] for k in SIZES}))
    init_from_target(head, frozen.layers, frozen.norm)
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return head.eval()


@pytest.fixture
def medusa() -> MedusaTreesDraftModel:
    """With output layers of its own, as published."""
    torch.manual_seed(6)
    config = MedusaTreesConfig(128, 211, num_heads=3, num_hidden_layers=2, own_lm_heads=True)
    head = MedusaTreesDraftModel(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return head.eval()


def paths(tree: Tree) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        found.append((() if parent == ROOT else found[parent]) + (token,))
    return found


def next_log_probs(
    head: Head, frozen: FrozenTarget, ids: torch.Tensor, path: tuple[int, ...]
) -> torch.Tensor:
    """What a head predicts after a draft path, recomputed from nothing.

    `ids` are the tokens emitted so far; the target's states are known for all but the last.
    """
    hidden = frozen.hidden_states(ids[None, :-1])
    embeds = frozen.lm_head[ids[1:]][None]
    if isinstance(head, MedusaTreesDraftModel):
        feature = frozen.norm(hidden)[0, -1]
        assert head.lm_heads is not None
        return torch.log_softmax(head.lm_heads[len(path)] @ head.heads[len(path)](feature), -1)
    if isinstance(head, Clover1DraftModel):
        r = head.advance(head.augment(hidden)[0, -1], embeds[0, -1])
        for token in path:
            r = head.advance(r, frozen.lm_head[token])
        return torch.log_softmax(frozen.lm_head @ head.head_norm(head.heads[min(len(path), 2)](r)), -1)
    if isinstance(head, Clover2DraftModel):
        r = head.augment(hidden, embeds)[0, -1]
        s = head.first(r)
        for token in path:
            r, s = head.advance(r, frozen.lm_head[token])
    else:
        assert isinstance(head, Eagle1DraftModel)
        features = frozen.norm(hidden)
        out = head(features, embeds)
        for token in path:
            features = torch.cat([features, out[:, -1:]], dim=1)
            embeds = torch.cat([embeds, frozen.lm_head[token][None, None]], dim=1)
            out = head(features, embeds)
        s = out[0, -1]
    return torch.log_softmax(frozen.lm_head @ s, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_drafted_trees_equal_recomputation_from_nothing(
    kind: str, request: pytest.FixtureRequest, frozen: FrozenTarget, answers: list[Answer]
) -> None:
    head = request.getfixturevalue(kind)
    answer = answers[0]
    ids = torch.cat([answer.prompt_ids, answer.answer_ids])
    evaluator = Evaluator(frozen, head, chunk_elements=12 * 211 * 3)  # three positions at a time
    with torch.no_grad():
        trees = evaluator.trees(evaluator.prepare(answer), best_first(12, rounds=4, width=3))
        for position, tree in enumerate(trees):
            so_far = ids[: len(answer.prompt_ids) + 1 + position]
            for node, path in enumerate(paths(tree)):
                joint = sum(
                    float(next_log_probs(head, frozen, so_far, path[:d])[path[d]]) for d in range(len(path))
                )
                assert abs(math.exp(joint) - tree.probabilities[node]) < 1e-3 * math.exp(joint)


@pytest.mark.parametrize("kind", KINDS)
def test_replay_equals_a_real_draft_and_verify_loop(
    kind: str, request: pytest.FixtureRequest, frozen: FrozenTarget, answers: list[Answer]
) -> None:
    """Chains drafted with the head alone and verified by running the target on them."""
    head = request.getfixturevalue(kind)
    growth = Growth("chain", lambda drafter: grow_fixed(drafter, chain(3)))
    for answer in answers[:4]:
        (found,) = Evaluator(frozen, head).replay(answer, [growth])
        ids = torch.cat([answer.prompt_ids, answer.answer_ids[:1]])
        end = len(answer.prompt_ids) + len(answer.answer_ids)
        steps = tokens = 0
        with torch.no_grad():
            while len(ids) < end:
                path: tuple[int, ...] = ()
                for _ in range(3):
                    path = (*path, int(next_log_probs(head, frozen, ids, path).argmax()))
                hidden = frozen.hidden_states(torch.cat([ids, torch.tensor(path)])[None])
                said = (frozen.norm(hidden)[0, len(ids) - 1 :] @ frozen.lm_head.T).argmax(-1).tolist()
                accepted = 0
                while accepted < 3 and path[accepted] == said[accepted]:
                    accepted += 1
                emitted = said[: accepted + 1][: end - len(ids)]
                ids = torch.cat([ids, torch.tensor(emitted)])
                steps, tokens = steps + 1, tokens + len(emitted)
        assert ids[len(answer.prompt_ids) :].tolist() == answer.answer_ids.tolist()
        assert (found.steps, found.tokens) == (steps, tokens)


def test_a_perfect_drafter_accepts_everything(frozen: FrozenTarget, answers: list[Answer]) -> None:
    """Counting: with every draft right, a chain of 5 gives 6 tokens per step until the end."""

    class Drafter:
        def __init__(self, continuation: torch.Tensor, part: slice) -> None:
            self.tail = torch.cat([continuation, torch.zeros(9, dtype=torch.int64)])
            self.rows = torch.arange(len(continuation) + 1)[part]
            self.depth = 0

        def first(self, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(self.rows), 1), self.tail[self.rows][:, None]

        def expand(
            self, parent_slots: torch.Tensor, tokens: torch.Tensor, num_candidates: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self.depth += 1
            return torch.zeros(len(tokens), 1, 1), self.tail[self.rows + self.depth][:, None, None]

    class Oracle(Evaluator):
        def prepare(self, answer: Answer) -> Prepared:
            prepared = super().prepare(answer)
            prepared.new_drafter = lambda part: Drafter(prepared.continuation, part)
            return prepared

    oracle = Oracle(frozen, Clover2DraftModel(config_for_target(frozen.config)))
    for answer in answers:
        found = oracle.replay(answer, [Growth("c", lambda d: grow_fixed(d, chain(5)))])[0]
        tokens = len(answer.answer_ids) - 1
        assert found.tokens == tokens
        assert found.steps == -(-tokens // 6)


def test_answers_of_another_model_are_refused(
    frozen: FrozenTarget, clover: Clover2DraftModel, answers: list[Answer]
) -> None:
    evaluator = Evaluator(frozen, clover)
    evaluator.check_answers(answers)
    foreign = [Answer(a.category, a.prompt_ids, a.answer_ids.flip(0)) for a in answers]
    with pytest.raises(UserError, match="another model's") as caught:
        evaluator.check_answers(foreign)
    one_sentence(caught.value)


def test_default_growths_are_those_of_the_model_card() -> None:
    assert [g.name for g in default_growths()] == [
        "chain of 5",
        "tree of 4",
        "tree of 8",
        "tree of 16",
        "tree of 25",
        "published 25",
    ]


def test_answers_of_some_sources_alone_are_measured(tiny_answers: Path, frozen: FrozenTarget) -> None:
    found = greedy_answers([tiny_answers], frozen, 5, ["kind2"])
    assert [answer.category for answer in found] == ["kind2"] * 5
    with pytest.raises(UserError, match="'kind9'; there are kind0, kind1, kind2"):
        greedy_answers([tiny_answers], frozen, None, ["kind9"])
