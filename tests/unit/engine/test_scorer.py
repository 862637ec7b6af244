"""Verification along trees is ordinary sampling: exact distributions, histories and draws."""

from __future__ import annotations

import copy
import math
import random
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.outputs import SamplerOutput
from vllm.v1.request import Request
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from clover_vllm.engine.endings import repetition
from clover_vllm.engine.scorer import TreeScorer
from clover_vllm.tree import Tree
from clover_vllm.tree.step import CurrentStep, Ending, Step

VOCAB = 7


def metadata(requests: int, **changes: Any) -> SamplingMetadata:
    """Sampling at temperature 1 unless changed."""
    greedy = changes.pop("greedy", False)
    values: dict[str, Any] = {
        "temperature": None if greedy else torch.ones(requests),
        "all_greedy": greedy,
        "all_random": not greedy,
        "top_p": None,
        "top_k": None,
        "generators": {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": torch.zeros(requests),
        "presence_penalties": torch.zeros(requests),
        "repetition_penalties": torch.ones(requests),
        "output_token_ids": [],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**{**values, **changes})


def language(history: tuple[int, ...]) -> torch.Tensor:
    """Logits of a random language whose next token depends on the history."""
    generator = torch.Generator().manual_seed(hash(history) % 2**31)
    return 1.5 * torch.randn(VOCAB, generator=generator)


def random_tree(rng: random.Random, nodes: int) -> Tree:
    keys: list[tuple[int, int]] = []
    while len(keys) < nodes:
        key = (rng.randrange(-1, len(keys)), rng.randrange(VOCAB))
        if key not in keys:
            keys.append(key)
    return Tree([token for _, token in keys], [parent for parent, _ in keys])


def rows_of(tree: Tree, history: tuple[int, ...] = ()) -> torch.Tensor:
    """The language's logits at the root and at every node."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(history if parent < 0 else paths[parent]), token))
    return torch.stack([language(history), *(language(path) for path in paths)])


def score(
    scorer: TreeScorer,
    trees: list[Tree],
    logits: torch.Tensor,
    sampling: SamplingMetadata,
    **batch: Any,
) -> list[list[int]]:
    sampled = run(scorer, Step.of_trees(list(trees), **batch), logits, sampling).sampled_token_ids.tolist()
    return [[token for token in row if token >= 0] for row in sampled]


def run(scorer: TreeScorer, step: Step, logits: torch.Tensor, sampling: SamplingMetadata) -> SamplerOutput:
    spec = SpecDecodeMetadata.make_dummy(
        [list(tree.tokens) if tree else [] for tree in step.trees], torch.device("cpu")
    )
    scorer._current.begin(step)
    try:
        return scorer(spec, None, logits, sampling)
    finally:
        scorer._current.end()


def new_scorer() -> TreeScorer:
    return TreeScorer(Sampler(), CurrentStep())


def first_two_tokens(scorer: TreeScorer, samples: int) -> Counter[tuple[int, int]]:
    """Two tokens per sample: those a step emits, and if it emits one, a plain sample after it."""
    rng = random.Random(0)
    found: Counter[tuple[int, int]] = Counter()
    batch = 500
    for _ in range(samples // batch):
        trees = [random_tree(rng, rng.randrange(1, 7)) for _ in range(batch)]
        logits = torch.cat([rows_of(tree) for tree in trees])
        for tokens in score(scorer, trees, logits, metadata(batch)):
            if len(tokens) == 1:
                after = language((tokens[0],)).softmax(-1)
                tokens.append(int(torch.multinomial(after, 1)))
            found[tokens[0], tokens[1]] += 1
    return found


def largest_z(found: Counter[tuple[int, int]]) -> float:
    """Largest deviation from the exact probabilities, in standard errors: of the first token, and of
    the second given the first."""
    total, worst = sum(found.values()), 0.0
    first = language(()).softmax(-1)
    for a in range(VOCAB):
        own = sum(found[a, b] for b in range(VOCAB))
        worst = max(worst, z(own, total, float(first[a])))
        second = language((a,)).softmax(-1)
        worst = max(worst, *(z(found[a, b], own, float(second[b])) for b in range(VOCAB)))
    return worst


def z(count: int, total: int, probability: float) -> float:
    return abs(count - total * probability) / math.sqrt(total * probability * (1 - probability))


class BiasedScorer(TreeScorer):
    """Adds 2% to one token at every root: what a careless acceptance rule does."""

    def _sample(self, logits: torch.Tensor, step: Step, *rest: Any) -> Any:
        logits, row = logits.clone(), 0
        for tree in step.trees:
            assert tree is not None
            probs = 0.98 * logits[row].softmax(-1)
            probs[3] += 0.02
            logits[row] = probs.log()
            row += len(tree.tokens) + 1
        return super()._sample(logits, step, *rest)


SAMPLES = 40_000
LIMIT = 4.5  # 56 cells: one in 3,000 runs of a right sampler goes above


@pytest.mark.slow
def test_unseeded_sampling_has_the_targets_distribution() -> None:
    torch.manual_seed(0)
    assert largest_z(first_two_tokens(new_scorer(), SAMPLES)) < LIMIT


@pytest.mark.slow
def test_a_bias_of_two_percent_is_caught() -> None:
    torch.manual_seed(0)
    assert largest_z(first_two_tokens(BiasedScorer(Sampler(), CurrentStep()), SAMPLES)) > 2 * LIMIT


def plain_tokens(accepted: int, generator: torch.Generator, **changes: Any) -> list[int]:
    """What plain decoding samples, one token after the other, with the same randomness."""
    history: tuple[int, ...] = ()
    tokens: list[int] = []
    for _ in range(accepted + 1):
        sampled = Sampler()(
            language(history)[None].clone(), metadata(1, generators={0: generator}, **changes)
        )
        tokens.append(int(sampled.sampled_token_ids[0, 0]))
        history = (*history, tokens[-1])
    return tokens


def test_seeded_requests_draw_once_per_output_token() -> None:
    """Whatever the trees, and beside unseeded requests, in every order of depths."""
    rng = random.Random(1)
    scorer = new_scorer()
    for _ in range(30):
        trees = [random_tree(rng, rng.randrange(1, 9)) for _ in range(6)]
        seeds = {r: rng.randrange(1000) for r in (0, 2, 5)}
        own = {r: torch.Generator().manual_seed(seed) for r, seed in seeds.items()}
        logits = torch.cat([rows_of(tree) for tree in trees])
        got = score(scorer, trees, logits, metadata(6, generators=dict(own)))
        for r, seed in seeds.items():
            generator = torch.Generator().manual_seed(seed)
            assert got[r] == plain_tokens(len(got[r]) - 1, generator)
            assert torch.equal(own[r].get_state(), generator.get_state())


def test_prompts_that_go_on_draw_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    tree = random_tree(random.Random(2), 4)
    empty = Tree.chain([])
    logits = torch.cat([rows_of(tree), rows_of(empty)])
    score(
        new_scorer(), [tree, empty], logits, metadata(2, generators={1: generator}), discarded=frozenset({1})
    )
    assert torch.equal(generator.get_state(), before)


def test_penalties_see_the_path_and_histories_are_restored() -> None:
    """A repetition penalty at a node counts the path's tokens; vLLM appends them later itself."""
    rng = random.Random(4)
    scorer = new_scorer()
    deep = 0
    for _ in range(40):
        tree = random_tree(rng, 8)
        history: list[int] = []
        penalties = {
            "no_penalties": False,
            "prompt_token_ids": torch.full((1, 1), VOCAB),
            "repetition_penalties": torch.full((1,), 3.0),
            "greedy": True,
        }
        sampling = metadata(1, **penalties, output_token_ids=[history])
        (got,) = score(scorer, [tree], rows_of(tree), sampling, histories=[history])
        assert history == []
        plain: list[int] = []
        for _ in got:
            step = metadata(1, **penalties, output_token_ids=[list(plain)])
            plain.append(int(Sampler()(language(tuple(plain))[None].clone(), step).sampled_token_ids[0, 0]))
        assert got == plain
        deep += len(got) > 2
    assert deep > 0


def test_logprobs_are_those_of_plain_decoding() -> None:
    rng = random.Random(5)
    trees = [random_tree(rng, 7) for _ in range(5)]
    logits = torch.cat([rows_of(tree) for tree in trees])
    step = Step.of_trees(list(trees), with_logprobs=frozenset(range(5)))
    sampled = run(new_scorer(), step, logits, metadata(5, greedy=True, max_num_logprobs=2))
    assert sampled.logprobs_tensors is not None
    width = sampled.sampled_token_ids.shape[1]
    for r in range(5):
        history: tuple[int, ...] = ()
        for depth, token in enumerate(t for t in sampled.sampled_token_ids[r].tolist() if t >= 0):
            exact = language(history).log_softmax(-1)
            row = r * width + depth
            assert int(sampled.logprobs_tensors.logprob_token_ids[row, 0]) == token
            assert float(sampled.logprobs_tensors.logprobs[row, 0]) == pytest.approx(
                float(exact[token]), abs=1e-5
            )
            assert int(sampled.logprobs_tensors.selected_token_ranks[row]) == 1
            history = (*history, token)


def test_greedy_rows_are_walked_like_sampled_ones() -> None:
    """The fast path for plain greedy batches gives what the general one gives."""
    rng = random.Random(6)
    trees = [random_tree(rng, rng.randrange(0, 9)) for _ in range(40)]
    logits = torch.cat([rows_of(tree) for tree in trees])
    fast = score(new_scorer(), trees, logits, metadata(40, greedy=True))
    general = score(
        new_scorer(),
        trees,
        logits,
        metadata(40, greedy=True, max_num_logprobs=0),
        with_logprobs=frozenset(range(40)),
    )
    assert fast == general
    assert max(map(len, fast)) > 2


@pytest.mark.parametrize("greedy", [True, False])
def test_a_path_ends_where_the_request_does(greedy: bool) -> None:
    """At a token that ends it, and where its last token is out; the draws after it are not made."""
    rng, count = random.Random(10), 160
    trees = [random_tree(rng, 24) for _ in range(count)]
    logits = torch.cat([rows_of(tree) for tree in trees])

    def end_at(endings: dict[int, Ending]) -> tuple[list[list[int]], list[list[int]]]:
        generators = {} if greedy else {r: torch.Generator().manual_seed(r) for r in range(count)}
        step = Step.of_trees(list(trees), endings=endings)
        sampled = run(new_scorer(), step, logits, metadata(count, greedy=greedy, generators=generators))
        rows = sampled.sampled_token_ids.tolist()
        return [[token for token in row if token >= 0] for row in rows], step.accepted

    whole, nodes = end_at({})
    stops = {r: Ending(tokens=frozenset({3, 5})) for r in range(count // 4)}
    stops |= {r: Ending(repeats=lambda emitted: emitted[-1] in (3, 5)) for r in range(count // 4, count // 2)}
    short = {r: Ending(remaining=1 + r % 2) for r in range(count // 2, count)}
    cut, accepted = end_at({**stops, **short})
    ended = 0
    for r in range(count):
        at = [i for i, token in enumerate(whole[r]) if token in (3, 5)][:1] if r < count // 2 else [r % 2]
        kept = min(len(whole[r]), at[0] + 1 if at else len(whole[r]))
        assert cut[r] == whole[r][:kept]
        assert accepted[r] == nodes[r][: kept - 1]
        ended += kept < len(whole[r])
    assert ended > 3


def test_repetitions_end_a_path_where_vllm_ends_the_request() -> None:
    """Token by token, the outcome of `check_stop`."""
    rng, ended = random.Random(3), Counter[bool]()
    for _ in range(3000):
        size = rng.randrange(4)
        wanted = RepetitionDetectionParams(size, rng.randrange(size + 1), rng.randrange(2, 4))
        params = SamplingParams(max_tokens=99, min_tokens=rng.randrange(12), repetition_detection=wanted)
        output = [rng.randrange(2) for _ in range(rng.randrange(9))]
        repeats = repetition(params, output)
        assert repeats is not None
        request = Request("r", [1, 2], sampling_params=params, pooling_params=None)
        request.append_output_token_ids(output)
        emitted: list[int] = []
        for _ in range(5):
            emitted.append(rng.randrange(2))
            request.append_output_token_ids(emitted[-1])
            stops = check_stop(request, max_model_len=500)
            assert repeats(emitted) == stops
            ended[stops] += 1
            if stops:
                break
    assert min(ended.values()) > 500
    assert repetition(SamplingParams(), []) is None


def test_requests_that_score_chosen_tokens_share_a_batch() -> None:
    """`logprob_token_ids` of different lengths, on paths of different depths."""
    rng = random.Random(8)
    trees = [random_tree(rng, 8) for _ in range(4)]
    logits = torch.cat([rows_of(tree) for tree in trees])
    wanted = {0: [1, 2], 1: [1, 2, 3, 4], 3: [5]}
    sampling = metadata(4, greedy=True, logprob_token_ids=wanted)
    sampler = CountingSampler()
    sampled = run(TreeScorer(sampler, CurrentStep()), Step.of_trees(list(trees)), logits, sampling)
    assert set(sampler.rows) == {3}  # the fourth is scored in one pass
    assert sampled.logprobs_tensors is not None
    assert sampled.logprobs_tensors.logprobs.shape == (4 * sampled.sampled_token_ids.shape[1], 5)
    plain = score(new_scorer(), trees, logits, metadata(4, greedy=True))
    got = [[token for token in row if token >= 0] for row in sampled.sampled_token_ids.tolist()]
    assert got == plain


def test_processors_and_masks_see_every_depth() -> None:
    """Minimum lengths, allowed tokens and bad words along a path, as in plain decoding."""
    rng = random.Random(9)
    mask = torch.zeros(1, VOCAB, dtype=torch.bool)
    mask[0, 5] = True
    config, deep = VllmConfig(), 0
    for _ in range(40):
        tree, history = random_tree(rng, 30), list[int]()

        def make(history: list[int]) -> SamplingMetadata:
            processor = MinTokensLogitsProcessor(config, torch.device("cpu"), False)
            params = SamplingParams(min_tokens=2, stop_token_ids=[0, 1, 2])
            params.update_from_generation_config({}, 0)
            processor.update_state(BatchUpdate(1, [], [(0, params, [3], history)], []))
            return metadata(
                1,
                greedy=True,
                allowed_token_ids_mask=mask,
                bad_words_token_ids={0: [[3, 4]]},
                logitsprocs=LogitsProcessors([processor]),
                output_token_ids=[history],
            )

        (got,) = score(new_scorer(), [tree], rows_of(tree), make(history), histories=[history])
        plain: list[int] = []
        for _ in got:
            sampled = Sampler()(language(tuple(plain))[None].clone(), make(list(plain)))
            plain.append(int(sampled.sampled_token_ids[0, 0]))
        assert got == plain
        deep += len(got) > 2
    assert deep > 0


class CountingSampler(Sampler):
    """Remembers how many rows each sampling step had."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> SamplerOutput:
        self.rows.append(len(logits))
        return super().forward(logits, *args, **kwargs)


class Banning(AdapterLogitsProcessor):
    """A user's per-request processor: bans the token before the last from coming again."""

    def __init__(self) -> None:
        super().__init__(None, None, None)  # type: ignore[arg-type]

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        del params
        return None

    @staticmethod
    def ban(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) > 1:
            logits[output[-2]] = -torch.inf
        return logits


CONFIG = VllmConfig()
THINKING: Any = SimpleNamespace(reasoning_start_token_ids=[3], reasoning_end_token_ids=[6, 2])


class Batch:
    """Eight requests, each with another way of sampling, and a ninth whose prompt goes on. All think."""

    kinds = ("greedy", "seeded", "penalised", "min_tokens", "logit_bias", "min_p", "adapter", "budget")

    def __init__(self, seed: int) -> None:
        self.histories: list[list[int]] = [[] for _ in range(9)]
        self.generators = {r: torch.Generator().manual_seed(seed + r) for r in (1, 5, 8)}
        self.budgets = ThinkingBudgetStateHolder(THINKING, 9, 0, torch.device("cpu"), False)
        added = [(7, SamplingParams(thinking_token_budget=1), [3], self.histories[7])]
        self.budgets.sync_batch(BatchUpdate(9, [], added, []))

    def metadata(self, chosen: list[int]) -> SamplingMetadata:
        """Of some of the requests, as vLLM would have it were they the batch."""
        config, cpu, count = CONFIG, torch.device("cpu"), len(chosen)
        budgets = copy.copy(self.budgets)
        budgets._state = {chosen.index(r): state for r, state in self.budgets._state.items() if r in chosen}
        minimum = MinTokensLogitsProcessor(config, cpu, False)
        bias = LogitBiasLogitsProcessor(config, cpu, False)
        min_p, adapter = MinPLogitsProcessor(config, cpu, False), Banning()
        added = []
        for i, r in enumerate(chosen):
            params = SamplingParams(
                min_tokens=3 if r == 3 else 0,
                stop_token_ids=[0, 1, 2],
                logit_bias={4: 2.0, 5: -3.0} if r == 4 else None,
                min_p=0.3 if r == 5 else 0.0,
            )
            params.update_from_generation_config({}, 0)
            added.append((i, params, [3], self.histories[r]))
            if r == 6:
                adapter.req_info[i] = partial(Banning.ban, self.histories[r])
        for processor in (minimum, bias, min_p):
            processor.update_state(BatchUpdate(count, [], added, []))
        return metadata(
            count,
            greedy=False,
            all_random=False,
            temperature=torch.tensor([0.9 if r in (1, 5, 8) else 0.0 for r in chosen]),
            no_penalties=False,
            prompt_token_ids=torch.full((count, 1), VOCAB),
            repetition_penalties=torch.tensor([3.0 if r == 2 else 1.0 for r in chosen]),
            output_token_ids=[self.histories[r] for r in chosen],
            generators={i: self.generators[r] for i, r in enumerate(chosen) if r in self.generators},
            logitsprocs=LogitsProcessors([minimum, bias, min_p, adapter]),
            thinking_budget_state_holder=budgets,
            spec_token_ids=[[] for _ in chosen],
        )

    def plain(self, r: int, count: int) -> list[int]:
        """What plain decoding gives the request alone."""
        for _ in range(count):
            logits = language(tuple(self.histories[r]))[None].clone()
            sampled = Sampler()(logits, self.metadata([r]))
            self.histories[r].append(int(sampled.sampled_token_ids[0, 0]))
        return self.histories[r]


@pytest.mark.parametrize("narrow", [True, False])
def test_every_way_of_sampling_beside_the_others_is_plain_decoding(narrow: bool) -> None:
    """One batch of all of them. A greedy request is scored in one pass and never sampled; the others are
    sampled only while their paths go on, unless a processor of an unknown kind has to see everyone."""
    rng, deep = random.Random(12), Counter[str]()
    for seed in range(100):
        trees = [random_tree(rng, rng.randrange(20, 30)) for _ in range(8)]
        everyone = Batch(seed)
        sampling = everyone.metadata(list(range(9)))
        if not narrow:
            sampling.logitsprocs.argmax_invariant.append(Unknown())
        sampler = CountingSampler()
        step = Step.of_trees([*trees, None], histories=everyone.histories, discarded=frozenset({8}))
        logits = torch.cat([*(rows_of(tree) for tree in trees), language(())[None]])
        got = run(TreeScorer(sampler, CurrentStep()), step, logits, sampling).sampled_token_ids.tolist()
        assert everyone.histories == [[] for _ in range(9)]
        for r, kind in enumerate(Batch.kinds):
            tokens = [token for token in got[r] if token >= 0]
            assert tokens == Batch(seed).plain(r, len(tokens)), kind
            assert len(step.accepted[r]) == len(tokens) - 1
            deep[kind] += len(tokens) > 2
        assert got[7][1:2] in ([], [-1], [6]), "the first token used the budget up"
        untouched = torch.Generator().manual_seed(seed + 8)
        assert torch.equal(everyone.generators[8].get_state(), untouched.get_state())
        longest = max(len(step.accepted[r]) for r in range(1, 8)) + 1
        if narrow:
            expected = [sum(len(step.accepted[r]) >= d for r in range(1, 8)) for d in range(longest)]
        else:
            expected = [9] * longest
        assert sampler.rows == expected
    assert min(deep[kind] for kind in Batch.kinds) > 1


class Unknown(LogitsProcessor):
    """A user's processor of a kind of its own: it wants to see the whole batch, and changes nothing."""

    def __init__(self) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        assert batch_update is None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        assert len(logits) == 9
        return logits


def test_logprobs_are_as_wide_as_the_longest_path() -> None:
    """Not as the nodes; beside a request that wants none and goes further."""
    trees = [Tree([6] * 20, [-1] * 20), Tree.chain([1, 2, 3, 4])]
    logits = torch.full((21 + 5, VOCAB), 0.0)
    logits[:21, 5] = 9.0
    for row, token in enumerate([1, 2, 6]):
        logits[21 + row, token] = 9.0
    step = Step.of_trees(list(trees), with_logprobs=frozenset({0}))
    sampled = run(new_scorer(), step, logits, metadata(2, greedy=True, max_num_logprobs=1))
    assert sampled.sampled_token_ids.tolist() == [[5, -1, -1], [1, 2, 6]]
    assert sampled.logprobs_tensors is not None
    assert sampled.logprobs_tensors.logprobs.shape == (2 * 3, 2)
    assert int(sampled.logprobs_tensors.logprob_token_ids[0, 0]) == 5


def peak_of_many_rows(greedy: bool) -> int:
    """MiB by which this process grows while it scores 64 requests of 16 nodes, vocabulary 128,256."""
    requests, nodes, vocab = 64, 16, 128_256
    tokens = [1000 * node for node in range(nodes)]
    tree = Tree(tokens, [-1] * 4 + [0] * 4 + [4] * 8)
    logits = torch.zeros(requests * (nodes + 1), vocab, dtype=torch.bfloat16)
    logits.view(requests, nodes + 1, vocab)[:, 0, tokens[0]] = 50  # a path of three nodes is accepted
    logits.view(requests, nodes + 1, vocab)[:, 1, tokens[4]] = 50
    logits.view(requests, nodes + 1, vocab)[:, 5, tokens[8]] = 50
    top = {} if greedy else {"top_k": torch.full((requests,), 50), "top_p": torch.full((requests,), 0.9)}
    scorer = new_scorer()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on; a child starts with its parent's
    before = peak_memory()
    found = score(scorer, [tree] * requests, logits, metadata(requests, greedy=greedy, **top))
    assert all(row[:3] == [tokens[0], tokens[4], tokens[8]] for row in found)
    return (peak_memory() - before) // 1024


def peak_memory() -> int:
    """Most KiB that this process held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """MiB by kind, each of a process of its own, forked from one that has imported everything."""
    code = """
import os, test_scorer
for kind in ("greedy", "sampled"):
    if not os.fork():
        print(kind, test_scorer.peak_of_many_rows(kind == "greedy"), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    words = done.stdout.split()[-4:]
    return {words[i]: int(words[i + 1]) for i in (0, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("greedy", 130), ("sampled", 300)])
def test_memory_does_not_grow_with_the_rows_of_trees(peaks: dict[str, int], kind: str, most: int) -> None:
    """In float32 the logits of all rows take 532 MiB, those of one row per request 31."""
    print(f"{kind}: {peaks[kind]} MiB")
    assert 10 < peaks[kind] < most
