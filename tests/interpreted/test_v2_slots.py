"""Trees by request slot, and the head's rows, against plain loops."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import vllm.v1.worker.cpu_worker  # noqa: F401  (vLLM's copies to the device are then its CPU build's)
from documented import documented
from vllm import SamplingParams
from vllm.v1.worker.gpu.input_batch import InputBuffers

from clover_vllm.attention.triton.inputs import CAUSAL
from clover_vllm.check.features import FEATURES, KINDS
from clover_vllm.check.scripted import sampling_arguments
from clover_vllm.engine.backends.gpu import StepRows
from clover_vllm.engine.v2.layout import HeadRows, ScoredSlots, head_lengths
from clover_vllm.engine.v2.trees import NO_SLOT, SlotTrees, needs_history
from clover_vllm.tree import MAX_NODES, ROOT, Tree, TreeBatch
from clover_vllm.tree.batch import PADDING

SLOTS, NODES = 6, 5
TREE = Tree([7, 8, 9, 4, 5], [-1, -1, 0, 1, 2])  # 7 -> 9 -> 5, and 8 -> 4


def slot_trees(total: int = 10, longest: int = 100, nodes: int = NODES) -> SlotTrees:
    requests = SimpleNamespace(
        max_num_reqs=SLOTS,
        num_speculative_steps=nodes,
        device=torch.device("cpu"),
        max_seq_len=np.full(SLOTS, longest),
        total_len=SimpleNamespace(gpu=torch.full((SLOTS,), total, dtype=torch.int32)),
    )
    return SlotTrees(cast(Any, requests))


def batch_of(*trees: Tree) -> TreeBatch:
    tokens = torch.tensor([list(tree.tokens) for tree in trees])
    return TreeBatch(tokens, torch.tensor([list(tree.parents) for tree in trees]), torch.zeros(tokens.shape))


def put(trees: SlotTrees, slot: int, params: SamplingParams) -> list[int]:
    trees.add_request(slot, params)
    trees.put(torch.tensor([slot]), batch_of(TREE), torch.empty(1, NODES, dtype=torch.int64))
    return trees.kept.tokens[slot].tolist()


def test_a_tree_is_kept_as_it_is() -> None:
    trees = slot_trees()
    assert put(trees, 2, SamplingParams(max_tokens=50)) == list(TREE.tokens)
    assert trees.kept.parents[2].tolist() == list(TREE.parents)


def test_requests_with_a_history_get_their_likeliest_chain() -> None:
    for params in (
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.2},
        {"bad_words": ["a"]},
        {"thinking_token_budget": 4},
    ):
        trees = slot_trees()
        assert put(trees, 1, SamplingParams(**params)) == [7, 9, 5, PADDING, PADDING]
        assert trees.kept.parents[1].tolist() == [-1, 0, 1, 2, 3]
    assert not needs_history(
        SamplingParams(temperature=0.8, top_p=0.5, min_p=0.1, logit_bias={3: 1.0}, seed=1)
    )


@pytest.mark.parametrize("feature", FEATURES)
def test_the_docs_say_who_gets_chains(feature: str) -> None:
    params = SamplingParams(**sampling_arguments(KINDS["seeded"] | FEATURES[feature]))
    drafts = {documented("on a GPU")[name] for name in {**KINDS["seeded"], **FEATURES[feature]}}
    assert needs_history(params) == ("chain" in drafts)


def test_requests_that_a_users_processor_changes_get_their_likeliest_chain() -> None:
    trees = slot_trees()
    processor = SimpleNamespace(add_request=lambda _, params: bool(params.extra_args))
    trees.follow(cast(Any, processor))
    for extra, changes in (({"favour": True}, True), (None, False)):
        params = SamplingParams(max_tokens=50, extra_args=extra)
        assert processor.add_request(3, params) == changes
        kept = put(trees, 3, params)
        assert kept == ([7, 9, 5, PADDING, PADDING] if changes else list(TREE.tokens))


def test_nothing_that_ends_a_request_is_accepted() -> None:
    assert put(slot_trees(), 0, SamplingParams(stop_token_ids=[9, 77])) == [7, 8, PADDING, 4, 5]
    assert put(slot_trees(total=98), 0, SamplingParams()) == [7, 8, PADDING, PADDING, PADDING]
    assert put(slot_trees(total=99), 0, SamplingParams()) == [PADDING] * 5
    assert put(slot_trees(), 0, SamplingParams(stop_token_ids=list(range(100, 300)))) == [PADDING] * 5


def step_batch(rows: list[int], drafts: list[int], computed: list[int], slots: list[int]) -> Any:
    """A batch as vLLM's V2 runner prepares it; tokens are their row's number."""
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    counts = [draft + 1 for draft in drafts]
    firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return SimpleNamespace(
        num_reqs=len(rows),
        idx_mapping=torch.tensor(slots),
        idx_mapping_np=np.array(slots),
        num_scheduled_tokens=np.array(rows, dtype=np.int32),
        num_draft_tokens_per_req=np.array(drafts, dtype=np.int32),
        query_start_loc=torch.from_numpy(starts),
        seq_lens=torch.tensor([c + r for c, r in zip(computed, rows, strict=True)], dtype=torch.int32),
        input_ids=torch.arange(int(starts[-1]), dtype=torch.int32),
        positions=torch.cat([torch.arange(c, c + r) for c, r in zip(computed, rows, strict=True)]),
        logits_indices=torch.tensor(
            [stop - count + i for stop, count in zip(starts[1:], counts, strict=True) for i in range(count)]
        ),
        cu_num_logits=torch.from_numpy(firsts),
        expanded_idx_mapping=torch.tensor(slots).repeat_interleave(torch.tensor(counts)),
        expanded_local_pos=torch.tensor([i for count in counts for i in range(count)], dtype=torch.int32),
    )


def test_positions_and_masks_of_a_mixed_step() -> None:
    """A prompt chunk, a tree, a tree that the scheduler cut, and placeholders behind a prompt's last token."""
    trees = slot_trees()
    for slot in range(SLOTS):
        put(trees, slot, SamplingParams(max_tokens=50))
    batch = step_batch([4, 6, 4, 6], [0, 5, 3, 5], [0, 20, 30, 11], [3, 0, 1, 2])
    prefill_lens = torch.tensor([20, 10, 12, 9, 0, 0], dtype=torch.int32)
    step = StepRows.make(32, NODES, torch.device("cpu"))
    trees.lay_out(batch, prefill_lens, step)
    masks = TREE.masks
    assert step.bits[:20].tolist() == [CAUSAL] * 4 + masks + masks[:4] + [CAUSAL] * 6
    assert batch.positions[4:10].tolist() == [20, 21, 21, 22, 22, 23]
    assert batch.positions[10:14].tolist() == [30, 31, 31, 32]
    assert batch.positions[14:].tolist() == list(range(11, 17))
    assert trees.kept.tokens[2].tolist() == [PADDING] * 5
    assert trees.kept.tokens[0].tolist() == list(TREE.tokens)


def test_what_a_grammar_has_not_seen_is_dropped() -> None:
    trees = slot_trees()
    for slot in range(SLOTS):
        put(trees, slot, SamplingParams(max_tokens=50))
    batch = step_batch([6, 6], [5, 5], [20, 30], [1, 4])
    trees.drop(torch.tensor([False] * 6 + [False, False, False, True, True, True]), batch)
    assert trees.kept.tokens[1].tolist() == list(TREE.tokens)
    assert trees.kept.tokens[4].tolist() == [7, 8, PADDING, PADDING, PADDING]


def test_the_heads_rows_are_those_of_plain_loops() -> None:
    rng = random.Random(0)
    for _ in range(50):
        deepest = rng.randrange(1, NODES + 1)
        rows, drafts, computed = [], [], []
        for _ in range(4):
            decodes = rng.random() < 0.7
            drafts.append(rng.randrange(NODES + 1) if decodes else 0)
            rows.append(drafts[-1] + 1 if decodes else rng.randrange(1, 9))
            computed.append(rng.randrange(30))
        slots = rng.sample(range(SLOTS), 4)
        batch = step_batch(rows, drafts, computed, slots)
        emitted, path = [], torch.zeros(4, NODES, dtype=torch.int32)
        for r, count in enumerate(drafts):
            accepted = sorted(rng.sample(range(1, count + 1), rng.randrange(min(count, deepest) + 1)))
            path[r, : len(accepted)] = torch.tensor(accepted, dtype=torch.int32)
            emitted.append(len(accepted) + 1 if count or rng.random() < 0.5 else 0)
        sampled = torch.tensor([[100 * r + i for i in range(NODES + 1)] for r in range(4)])
        next_prompt = torch.arange(900, 900 + SLOTS, dtype=torch.int32)
        slot_mapping = torch.arange(1000, 1000 + sum(rows))
        num_sampled = torch.tensor(emitted, dtype=torch.int32)
        found = HeadRows.make(
            InputBuffers(SLOTS, 64, torch.device("cpu")), torch.zeros(SLOTS, dtype=torch.int64)
        )
        lengths = head_lengths(batch, deepest)
        starts = found.lay_out(
            batch, ScoredSlots(sampled, path), num_sampled, next_prompt, slot_mapping, lengths, padded=SLOTS
        )
        at = 0
        for r in range(4):
            first, certain = sum(rows[:r]), rows[r] - drafts[r]
            assert found.starts[r] == starts[r] == at
            assert found.requests[r] == slots[r]
            true = certain + max(emitted[r] - 1, 0)
            assert found.last[r] == at + true - 1
            for j in range(certain + min(drafts[r], deepest)):
                assert found.positions[at] == computed[r] + j
                if j < true:
                    node = j - certain
                    row = j if node < 0 else certain - 1 + int(path[r, node])
                    assert found.source[at] == first + row
                    behind = first + j + 1 if j < certain - 1 else int(sampled[r, j - certain + 1])
                    if not emitted[r] and j == certain - 1:
                        behind = int(next_prompt[slots[r]])
                    assert found.next_tokens[at] == behind
                    assert found.slots[at] == 1000 + first + j
                else:
                    assert found.slots[at] == -1
                at += 1
            assert found.seq_lens[r] == computed[r] + certain + min(drafts[r], deepest)
        assert found.starts[4:].tolist() == starts[4:].tolist() == [at] * 3
        assert found.seq_lens[4:].tolist() == found.last[4:].tolist() == [0, 0]
        assert found.requests[4:].tolist() == [NO_SLOT] * 2
        assert found.slots[at : at + 2 * lengths[0]].tolist() == [-1] * (2 * lengths[0])


def test_padding_belongs_to_no_tree() -> None:
    trees = slot_trees()
    trees.add_request(0, SamplingParams(max_tokens=50))
    made = torch.full((1, NODES), 77)
    trees.put(torch.tensor([0]), batch_of(Tree([3], [ROOT])), made)
    assert made.tolist() == [[3, 0, 0, 0, 0]]
    assert trees.kept.tokens[0].tolist() == [3] + [PADDING] * 4


def test_masks_and_chains_are_those_of_each_tree() -> None:
    rng = random.Random(3)
    for nodes in (1, 2, 16, MAX_NODES):
        trees = slot_trees(nodes=nodes)
        for slot in range(SLOTS):
            trees.add_request(slot, SamplingParams(presence_penalty=slot % 2, max_tokens=50))
        above = [[rng.randrange(-1, node) for node in range(nodes)] for _ in range(SLOTS - 1)]
        given = [Tree([rng.randrange(9) for _ in own], own) for own in [*above, list(range(-1, nodes - 1))]]
        trees.put(torch.arange(SLOTS), batch_of(*given), torch.empty(SLOTS, nodes, dtype=torch.int64))
        rows = [nodes + 1] * SLOTS
        batch = step_batch(rows, [nodes] * SLOTS, [20] * SLOTS, list(range(SLOTS)))
        step = StepRows.make(sum(rows), nodes, torch.device("cpu"))
        trees.lay_out(batch, torch.zeros(SLOTS, dtype=torch.int32), step)
        bits, positions = step.bits.view(SLOTS, -1), batch.positions.view(SLOTS, -1)
        for slot, tree in enumerate(given):
            expected = tree.likeliest_chain() if slot % 2 else tree
            count = len(expected) + 1
            assert trees.kept.tokens[slot].tolist()[: count - 1] == list(expected.tokens)
            assert trees.kept.tokens[slot].tolist()[count - 1 :] == [PADDING] * (nodes + 1 - count)
            assert bits[slot].tolist()[:count] == expected.masks
            assert positions[slot].tolist()[:count] == [20, *(20 + depth for depth in expected.depths)]


def test_requests_of_padding_keep_nothing() -> None:
    trees = slot_trees()
    before, made = trees.kept.tokens.clone(), torch.full((1, NODES), 77)
    trees.put(torch.tensor([NO_SLOT]), batch_of(TREE), made)
    assert torch.equal(trees.kept.tokens, before)
    assert made.tolist() == [[77] * NODES]
