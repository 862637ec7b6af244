"""Which batches have CUDA graphs, and what the records that stand in for them on a CPU show."""

from __future__ import annotations

import pytest
import torch
import vllm.v1.worker.cpu_worker  # noqa: F401  (vLLM's streams are then its CPU build's)
from recorded_graphs import Recorded, capturing

from clover_vllm.attention.triton.walk import walk_trees
from clover_vllm.engine.v2.graphs import request_sizes


def test_sizes_are_vllms_own_lie_apart_and_reach_the_largest_batch() -> None:
    usual = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    assert request_sizes(usual, 256, 1.25) == [
        1,
        2,
        4,
        8,
        16,
        24,
        32,
        40,
        56,
        72,
        96,
        120,
        152,
        192,
        240,
        256,
    ]
    assert request_sizes(usual, 256, 1.0) == usual[: usual.index(256) + 1]
    assert request_sizes(usual, 100, 1.25)[-2:] == [96, 100]
    assert request_sizes(usual, 3, 1.25) == [1, 2, 3]
    assert request_sizes(range(1, 9), 64, 2.0) == list(range(1, 9))
    assert request_sizes(usual, 0, 1.25) == []
    assert request_sizes([17, 18, 34, 136], 64, 1.25) == [17, 34, 64]


def test_a_replay_sees_static_inputs_alone() -> None:
    given, taken, other = torch.ones(4), torch.zeros(4), torch.ones(4)
    count = 2
    graph = Recorded()
    with capturing(graph):
        taken[:count] = (given + other)[:count] * 3
    given.fill_(5)
    count, other = 4, torch.zeros(4)
    graph.replay()
    assert taken.tolist() == [18, 18, 0, 0]


def test_a_replay_launches_triton_kernels() -> None:
    emitted, starts, slots = (
        torch.tensor([7, 8, 9]),
        torch.tensor([0, 3], dtype=torch.int32),
        torch.tensor([0]),
    )
    tokens, parents = torch.tensor([[7, 8]]), torch.tensor([[-1, 0]])
    graph = Recorded()
    with capturing(graph):
        sampled, num_sampled, _ = walk_trees(emitted, starts, slots, tokens, parents)
    assert sampled.tolist() == [[7, 8, 9]]
    tokens[0, 1] = 5
    graph.replay()
    assert sampled.tolist() == [[7, 8, -1]]
    assert num_sampled.tolist() == [2]


def test_what_waits_for_the_device_is_no_graph() -> None:
    with pytest.raises(AssertionError, match="waits"), capturing(Recorded()):
        torch.ones(1).item()
