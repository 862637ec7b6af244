"""The engine drafts where a draft can be of use, and reserves what drafting needs."""

from __future__ import annotations

import pytest
from engines import Json, run_engine
from pairs import VOCAB, llm, make_pair, random_requests, speculative

STOPS = {"stop_token_ids": list(range(VOCAB)), "ignore_eos": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Json:
    """24 requests: a third may say two tokens, a third three, and a third ends with whatever it says first."""
    target, head = make_pair(tmp_path_factory.mktemp("pair"), "llama tied")
    requests = random_requests(24)
    for i, request in enumerate(requests):
        request["params"] |= {"max_tokens": 3 if i % 3 == 1 else 2}
        request["params"] |= STOPS if i % 3 == 2 else {}
    return run_engine(llm(target, speculative_config=speculative(head)), requests)


def test_requests_that_end_or_have_one_token_to_go_get_no_draft(run: Json) -> None:
    """Only a request that may say three tokens can accept a draft, behind its first."""
    assert run["stats"]["grown"] == 8
    assert run["stats"]["verified"]["branching"] + run["stats"]["verified"]["chains"] == 8
    assert run["stats"]["in_vain"] == 0


def test_no_cache_slots_are_reserved_past_the_step(run: Json) -> None:
    assert run["stats"]["lookahead"] == 0
