"""A few minutes of the torture test; `clover-vllm torture` runs it for as long as one likes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from forked import fork_json_processes
from length import FULL, length

from clover_vllm.base.errors import UserError
from clover_vllm.check import torture as module
from clover_vllm.check.settings import TortureSettings
from clover_vllm.check.torture import TortureOutcome, difference, is_tie, torture
from clover_vllm.tree.kinds import SOURCES

Json = dict[str, Any]


@pytest.mark.timeout(1800)
def test_random_requests_through_random_engines_equal_plain_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torture` raises where a request differs; the rest says that there was something to see."""
    fork_json_processes(monkeypatch)
    settings = TortureSettings(
        requests=length(60, 2000),
        per_engine=length(30, 300),
        wave=length(15, 20),
        seed=100,
        output=tmp_path / "out.json",
    )
    outcome = torture(settings)
    assert outcome.requests == settings.requests
    assert outcome.engines == math.ceil(settings.requests / settings.per_engine)
    assert outcome.compared > 0.8 * settings.requests
    assert outcome.preempted > 0
    assert outcome.cached_tokens > 0
    assert outcome.accepted > 0.2 * outcome.drafts
    assert outcome.slept > 0
    assert set(outcome.verified) == set(SOURCES)
    assert all(0 < outcome.kept[source] <= outcome.verified[source] for source in ("head", "retrieved"))
    assert outcome.memory_growth is None  # too short to say
    waves = settings.per_engine // settings.wave
    assert all(len(memory) == waves and memory[-1][1] > 0 for memory in outcome.memory[:-1])
    assert (tmp_path / "out.png").stat().st_size > 0
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] == outcome.tokens


if FULL:  # `tests/engine/test_v2.py` has such requests in the short form

    @pytest.mark.timeout(1800)
    def test_random_requests_on_the_v2_runner_equal_plain_vllm(tmp_path: Path) -> None:
        settings = TortureSettings(
            requests=200, per_engine=20, wave=6, seed=7, interpreter=True, output=tmp_path
        )
        outcome = torture(settings)
        assert outcome.engines == math.ceil(settings.requests / settings.per_engine)
        assert outcome.compared > 0.7 * settings.requests
        assert outcome.accepted > 0
        assert json.loads((tmp_path / "torture-v2.json").read_text())["tokens"] == outcome.tokens


class FakeEngine:
    """Answers what is asked; the engine with trees says one token more than plain vLLM."""

    def __init__(self, name: str, llm: Any, script: int | None, core: int, interpret: bool) -> None:
        self._more = 1 if name == "Clover-2" else 0

    def hear(self) -> None: ...

    def close(self) -> None: ...

    def run(self, wave: list[Json], known: Any, noise: int | None = None) -> Json:
        sequence = {"text": "", "finish": "length", "stop": None, "logprobs": None, "prompt_logprobs": None}
        outputs = [[{**sequence, "tokens": [7] * (3 + self._more)}] for _ in wave]
        names = ("rss", "preempted", "cached_tokens", "leaked_blocks", "accepted", "drafts")
        stats = {**dict.fromkeys(names, 0), "slept": 0, "verified": {}, "kept": {}}
        return {"outputs": outputs, "stats": stats}


def test_a_difference_is_an_error_that_says_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "Engine", FakeEngine)
    settings = TortureSettings(requests=8, per_engine=8, wave=4, seed=3, output=tmp_path / "out.json")
    with pytest.raises(UserError, match=r"differ from plain vLLM.*--seed 3 --requests 8"):
        torture(settings)
    assert json.loads((tmp_path / "out.json").read_text())["differences"]


def test_growing_memory_is_seen_behind_the_warm_up() -> None:
    served = list(range(500, 25_001, 500))
    grown = TortureOutcome(memory=[[(0.0, 100.0 + 0.01 * s) for s in served]], served=[served])
    assert grown.memory_growth == pytest.approx(350 / 200 - 1)
    assert not grown.clean
    warm = TortureOutcome(memory=[[(0.0, 50.0 + min(s, 10_000) / 40) for s in served]], served=[served])
    assert warm.memory_growth == 0.0
    assert warm.clean
    assert TortureOutcome(memory=[[(0.0, 1.0), (1.0, 9.0)]], served=[[100, 200]]).memory_growth is None


def test_ties_are_what_plain_vllm_says_with_noise() -> None:
    def said(*sequences: list[int]) -> list[dict[str, list[int]]]:
        return [{"tokens": tokens} for tokens in sequences]

    plain, trees = said([1, 2, 3], [4, 5]), said([1, 9, 3], [4, 5, 6])
    by_noise = {3: said([1, 9, 9], [4, 5]), 7: said([1, 2, 3], [4, 5, 6])}
    assert is_tie(plain, trees, lambda seed: by_noise.get(seed, plain))
    assert not is_tie(plain, trees, lambda _: by_noise[3])  # explains one of the sequences only
    assert not is_tie(plain, trees, lambda _: said([7, 9, 3], [4, 5, 6]))  # differs before
    assert not is_tie(plain, plain, lambda _: plain)  # the same tokens: something else differs
    assert not is_tie(plain, trees[:1], lambda _: trees)


def test_differences_are_seen() -> None:
    one = {
        "tokens": [1, 2, 3],
        "text": "abc",
        "finish": "length",
        "stop": None,
        "logprobs": [[(1, -0.5, 1)], [(2, -0.5, 1)], [(3, -0.5, 1)]],
        "prompt_logprobs": None,
    }
    assert difference([one], [{**one}]) is None
    assert difference([one], []) is not None
    for change in (
        {"tokens": [1, 2, 4]},
        {"tokens": [1, 2]},
        {"text": "ab"},
        {"finish": "stop"},
        {"stop": 3},
        {"logprobs": [[(1, -0.5, 1)], [(2, -0.6, 1)], [(3, -0.5, 1)]]},
        {"logprobs": None},
        {"logprobs": [[(1, -0.5, 1)], [(2, -0.5, 1)]]},
        {"logprobs": [[(1, -0.5, 1)], [(2, float("nan"), 1)], [(3, -0.5, 1)]]},
        {"logprobs": [[(1, -0.5, 1)], [(7, -0.5, 1)], [(3, -0.5, 1)]]},
        {"prompt_logprobs": [[(1, -0.5, 1)]]},
    ):
        assert difference([one], [{**one, **change}]) is not None, change
    # Where no token is allowed, the candidates beside the one that was taken mean nothing.
    nothing = {**one, "logprobs": [[(1, float("nan"), 0), (3, float("nan"), 1)]]}
    assert difference([nothing], [{**one, "logprobs": [[(1, float("nan"), 1)]]}]) is None
    assert difference([nothing], [{**one, "logprobs": [[(2, float("nan"), 1)]]}]) is not None
    assert difference([nothing], [{**one, "logprobs": [[(1, -0.5, 1), (3, -1.0, 2)]]}]) is not None
