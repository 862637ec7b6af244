"""Without seeds and with them, with top-p and n above 1, sequences come out as often as the target says.

A target of 12 tokens, so that the exact probabilities of its sequences can be counted out; every token but the first
of a sequence may come from an accepted draft. A fifth of the trees is random in shape and tokens; the others are the head's, the
same wherever the text is, so that a rule that favours drafts favours the same tokens again and again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Json, run_engine, tokens_of
from length import length
from pairs import SIZES, llm, speculative
from transformers import LlamaConfig, LlamaForCausalLM

from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import save_head
from clover_vllm.heads.clover2.init import config_for_target, init_from_target
from clover_vllm.target.frozen import FrozenTarget

VOCAB = 12
TOKENS = 5
TEMPERATURE = 0.9
TOP_P = 0.9
PROMPTS = [[3, 7, 5, 9, 4], [8, 8, 1, 11, 6, 2, 10]]
REQUESTS = length(500, 6000)
"""Of each prompt, with seeds and again without; two sequences each."""
LEAST_P = 1e-4
"""36 tests are made: samples that are right fall below it once in 280 runs, and the seeds are fixed."""
WRONG = ["random_child", "second_chance", "row_before"]

Law = Mapping[tuple[int, ...], float]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("dozen")
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": VOCAB, "tie_word_embeddings": False}
    LlamaForCausalLM(LlamaConfig(**sizes)).float().save_pretrained(folder / "target")
    frozen = FrozenTarget(folder / "target", torch.float32)
    head = Clover2DraftModel(config_for_target(frozen.config, target="dozen"))
    init_from_target(head, frozen.layers, frozen.norm)
    save_head(head, folder / "head")
    return folder / "target", folder / "head"


@pytest.fixture(scope="module")
def laws(pair: tuple[Path, Path]) -> list[Law]:
    """By prompt, the exact probability of every sequence that can come out."""
    target = FrozenTarget(pair[0], torch.float32)
    return [law_of(target, prompt) for prompt in PROMPTS]


@torch.no_grad()
def law_of(target: FrozenTarget, prompt: list[int]) -> dict[tuple[int, ...], float]:
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(TOKENS):
        prefixes = list(law)
        hidden = target.hidden_states(torch.tensor([[*prompt, *prefix] for prefix in prefixes]))
        logits = target.norm(hidden[:, -1]) @ target.lm_head.T
        following = allowed(logits.double() / TEMPERATURE)
        law = {
            (*prefix, token): law[prefix] * p
            for prefix, row in zip(prefixes, following.tolist(), strict=True)
            for token, p in enumerate(row)
            if p > 0
        }
    return law


def allowed(logits: torch.Tensor) -> torch.Tensor:
    """Probabilities [B, V] after top-p: the least likely tokens go whose sum is at most 1 - p."""
    probs, order = logits.softmax(-1).sort(-1)
    gone = probs.cumsum(-1) <= 1 - TOP_P
    gone[:, -1] = False
    probs = probs.masked_fill(gone, 0.0)
    return torch.zeros_like(probs).scatter(-1, order, probs / probs.sum(-1, keepdim=True))


def sample(pair: tuple[Path, Path], requests: int, **more: Any) -> tuple[list[Json], Json]:
    """By prompt and kind, the pairs of sequences; and statistics."""
    target, head = pair
    params: Json = {
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "n": 2,
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
    asked = [
        {"prompt": prompt, "params": params | ({"seed": 2 * i + shift} if seeded else {})}
        for i in range(requests)
        for prompt, shift in zip(PROMPTS, (0, 10**6), strict=True)
        for seeded in (False, True)
    ]
    settings = llm(
        target,
        max_num_seqs=96,
        max_num_batched_tokens=4096,
        speculative_config=speculative(head, draft_min_joint=0.0),
    )
    run = run_engine(settings, asked, scripted={"answers": [], "seed": 3, "share": 0.2}, **more)
    groups = [
        {"prompt": kind // 2, "seeded": bool(kind % 2), "pairs": tokens_of(run)[kind::4]} for kind in range(4)
    ]
    return groups, run["stats"]


def p_values(groups: list[Json], laws: list[Law]) -> dict[str, float]:
    """By what was counted: tokens at each position, three in a row, and those of both sequences of a request."""
    found: dict[str, float] = {}
    for group in groups:
        law, pairs = laws[group["prompt"]], group["pairs"]
        sequences = [tuple(sequence) for both in pairs for sequence in both]
        assert all(len(sequence) == TOKENS for sequence in sequences)
        name = f"prompt {group['prompt']}, {'seeded' if group['seeded'] else 'unseeded'}"
        for positions in [*((i,) for i in range(TOKENS)), (0, 1, 2), (2, 3, 4)]:
            counts = Counter(tuple(sequence[i] for i in positions) for sequence in sequences)
            found[f"{name}, tokens {positions}"] = p_value(counts, marginal(law, positions))
        for i in (1, 3):
            own = marginal(law, (i,))
            both = {(*a, *b): p * q for a, p in own.items() for b, q in own.items()}
            counts = Counter((one[i], other[i]) for one, other in pairs)
            found[f"{name}, token {i} of both"] = p_value(counts, both)
    return found


def marginal(law: Law, positions: Sequence[int]) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {}
    for sequence, p in law.items():
        key = tuple(sequence[i] for i in positions)
        found[key] = found.get(key, 0.0) + p
    return found


def p_value(counts: Mapping[tuple[int, ...], float], law: Law) -> float:
    """Pearson's chi-square test; cells that expect fewer than 5 are counted as one."""
    total = sum(counts.values())
    if not counts.keys() <= law.keys():
        return 0.0
    cells = [(counts.get(key, 0), total * p) for key, p in law.items() if total * p >= 5]
    rare = [(counts.get(key, 0), total * p) for key, p in law.items() if total * p < 5]
    if rare:
        cells.append((sum(n for n, _ in rare), sum(e for _, e in rare)))
    statistic = sum((n - expected) ** 2 / expected for n, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_p_values_are_those_of_the_tables() -> None:
    """Of chi-square, 5% lie above 3.841 with one degree of freedom, above 11.070 with five."""
    two: Counter[tuple[int, ...]] = Counter({(0,): 50 + 10, (1,): 50 - 10})  # chi-square 4
    assert p_value(two, {(0,): 0.5, (1,): 0.5}) == pytest.approx(0.0455, abs=1e-4)
    assert p_value(two, {(0,): 1.0}) == 0.0
    shift = math.sqrt(11.070 * 600 / 6)
    six: dict[tuple[int, ...], float] = {(i,): 600 + (shift if i % 2 else -shift) for i in range(6)}
    assert p_value(six, dict.fromkeys(six, 1 / 6)) == pytest.approx(0.05, abs=1e-4)


def test_sequences_have_the_targets_distribution(pair: tuple[Path, Path], laws: list[Law]) -> None:
    groups, stats = sample(pair, REQUESTS)
    found = p_values(groups, laws)
    print({key: value for key, value in stats.items() if "request" not in key and "last" not in key})
    print([len(law) for law in laws], sorted(found.items(), key=lambda item: item[1])[:5])
    assert all(len(law) > 100 for law in laws)
    assert len(found) == 36
    assert min(found.values()) > LEAST_P, found
    assert stats["accepted_in"]["branching"] > 2 * REQUESTS
    assert stats["off_first_chain"] > REQUESTS


@pytest.mark.parametrize("rule", WRONG)
def test_wrong_rules_are_caught(pair: tuple[Path, Path], laws: list[Law], rule: str) -> None:
    """By tests of tokens that may come from drafts, not by those of the first, which never does."""
    groups, stats = sample(pair, REQUESTS // length(2, 1), wrong_scorer=rule)
    found = p_values(groups, laws)
    print(rule, sorted(found.items(), key=lambda item: item[1])[:5])
    assert stats["accepted"] > REQUESTS // 2
    firsts = [p for name, p in found.items() if "tokens (0,)" in name]
    assert min(firsts) > LEAST_P
    assert min(found.values()) < LEAST_P / 1000
