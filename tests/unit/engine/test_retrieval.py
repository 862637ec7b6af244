"""Continuations of earlier text, of a request's own or of others."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clover_vllm.engine.drafting.retrieval import ANSWERS, LEAST_SHARE, TRY, Retrieval, suffix_cache
from clover_vllm.tree import ROOT


def state(prompt: Sequence[int] | None, output: Sequence[int] = ()) -> Any:
    """What is read of vLLM's `CachedRequestState`."""
    return SimpleNamespace(prompt_token_ids=prompt and list(prompt), output_token_ids=list(output))


def retrieval(kind: str = "all", longest_pause: int = 0, **more: Any) -> Retrieval:
    """That never rests unless told so."""
    return Retrieval(suffix_cache(kind), longest_pause, **more)


def chain_of(found: Any) -> list[int]:
    """The tokens along the likeliest path."""
    tokens: list[int] = []
    current = ROOT
    while True:
        children = [n for n, parent in enumerate(found.parents) if parent == current]
        if not children:
            return tokens
        current = max(children, key=lambda n: found.probabilities[n])
        tokens.append(found.tokens[current])


PHRASE = [11, 12, 13, 14, 15, 16, 17, 18]


def test_the_own_prompt_is_continued() -> None:
    found = retrieval().look_up("a", state([*PHRASE, 5, 6], [11, 12, 13]), most=4)
    assert found is not None
    assert chain_of(found) == [14, 15, 16, 17]
    assert found.match == 3


def test_the_own_answer_is_continued_as_it_grows() -> None:
    own = retrieval()
    output: list[int] = []
    for token in [*PHRASE, 5, 6, 11, 12]:
        output.append(token)
        found = own.look_up("a", state([1, 2, 3], output), most=3)
    assert found is not None
    assert chain_of(found) == [13, 14, 15]


def test_what_was_said_while_nobody_looked_is_caught_up_with() -> None:
    own = retrieval()
    own.look_up("a", state([1, 2, 3], [4]), most=0)
    found = own.look_up("a", state([1, 2, 3], [4, *PHRASE, 9, 11, 12]), most=3)
    assert found is not None
    assert chain_of(found) == [13, 14, 15]


@pytest.mark.parametrize(("kind", "reaches"), [("all", True), ("own", False)])
def test_answers_reach_other_requests_only_where_that_is_asked_for(kind: str, reaches: bool) -> None:
    texts = retrieval(kind)
    texts.look_up("first", state([1, 2, 3], PHRASE), most=0)
    running = texts.look_up("second", state([4, 5], [11, 12, 13]), most=3)
    texts.forget(["first"])
    ended = texts.look_up("third", state([6, 7], [11, 12, 13]), most=3)
    assert (running is not None) == reaches
    assert (ended is not None) == reaches
    if ended is not None:
        assert chain_of(ended) == [14, 15, 16]


def test_prompts_never_reach_other_requests() -> None:
    texts = retrieval("all")
    texts.look_up("first", state(PHRASE, [1]), most=0)
    assert texts.look_up("second", state([4, 5], [11, 12, 13]), most=3) is None


def test_one_token_alone_is_no_match() -> None:
    """It would propose something after every comma."""
    assert retrieval().look_up("a", state([*PHRASE, 5, 6], [11]), most=4) is None


def test_a_fork_gives_both_ways_and_rare_ones_none() -> None:
    before = [8, 9, 1, 2]
    turns = [(3, 12), (4, 8), (5, 1)]
    prompt = [t for token, count in turns for i in range(count) for t in (*before, token, 100 * token + i)]
    found = retrieval().look_up("a", state(prompt, before), most=8)
    assert found is not None
    first = {
        t: p
        for t, parent, p in zip(found.tokens, found.parents, found.probabilities, strict=True)
        if parent == ROOT
    }
    assert first.keys() == {3, 4}
    assert first[3] > first[4] > LEAST_SHARE


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=4, max_size=60), st.integers(1, 16))
def test_what_is_found_is_a_tree_of_at_most_so_many_nodes(text: list[int], most: int) -> None:
    """Parents come first, siblings differ, and no child is likelier than its parent."""
    found = retrieval().look_up("a", state(text[:3], text[3:]), most)
    if found is None:
        return
    count = len(found.tokens)
    assert 1 <= count <= most
    assert len(found.parents) == len(found.probabilities) == count
    assert len(set(zip(found.parents, found.tokens, strict=True))) == count
    for node, parent in enumerate(found.parents):
        assert ROOT <= parent < node
        above = 1.0 if parent == ROOT else found.probabilities[parent]
        assert 0.0 < found.probabilities[node] <= above + 1e-6


def test_prompts_given_as_embeddings_have_no_text_to_search() -> None:
    assert retrieval().look_up("a", state(None, [11, 12, 11, 12]), most=4) is None


def test_no_nodes_asked_for_are_none() -> None:
    assert retrieval().look_up("a", state([*PHRASE, 5], [11, 12]), most=0) is None


def test_a_name_may_come_again() -> None:
    """A preempted request is forgotten and begins anew; a client may give one id twice."""
    texts = retrieval()
    for answer in ([*PHRASE], [*PHRASE, 1]):
        texts.look_up("a", state([1, 2, 3], answer), most=2)
        texts.forget(["a", "never seen"])
    assert texts.look_up("b", state([9], [11, 12, 13]), most=2) is not None


def test_the_oldest_answers_go_first() -> None:
    texts = retrieval()
    for i in range(ANSWERS + 1):
        texts.look_up(f"r{i}", state([1], [1000 + 2 * i, 1001 + 2 * i, 5000 + i]), most=0)
        texts.forget([f"r{i}"])
    gone, kept = (
        texts.look_up(f"again {i}", state([2], [1000 + 2 * i, 1001 + 2 * i]), most=1)
        for i in (0, ANSWERS - 1)
    )
    assert gone is None
    assert kept is not None


class Watched:
    """A suffix cache whose look-ups and prompts are counted."""

    def __init__(self) -> None:
        self.cache = suffix_cache("all")
        self.prompts = 0
        self.looked: list[int] = []  # by look-up, the length of its context

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def start_request(self, *args: Any) -> None:
        self.prompts += 1
        self.cache.start_request(*args)

    def speculate(self, name: str, tail: list[int], **more: Any) -> Any:
        self.looked.append(len(tail))
        return self.cache.speculate(name, tail, **more)


def test_a_text_that_never_repeats_is_looked_up_ever_more_rarely_and_one_that_does_at_every_step() -> None:
    cache = Watched()
    texts = Retrieval(cache, longest_pause=16)
    output: list[int] = []
    steps = []
    for step in range(70):
        output.append(100 + step)
        before = len(cache.looked)
        assert texts.look_up("new", state([1], output), most=4) is None
        if len(cache.looked) > before:
            steps.append(step)
    assert steps == [0, 2, 5, 10, 19, 36, 53]
    phrase = [*range(500, 580)]
    found = 0
    for step in range(1, 80):
        found += texts.look_up("old", state(phrase, phrase[:step]), most=4) is not None
    assert found >= 77


def test_what_was_found_and_did_not_come_is_a_look_up_in_vain_and_what_came_ends_the_rest() -> None:
    cache = Watched()
    texts = Retrieval(cache, longest_pause=16)
    prompt = [7, 8, 9] * 40
    output: list[int] = []
    steps = []
    for step in range(60):
        output += [7, 8]
        before = len(cache.looked)
        found = texts.look_up("a", state(prompt, output), most=4)
        if len(cache.looked) > before:
            assert found is not None
            steps.append(step)
        output.append(9 if step >= 40 else 900 + step)
    assert steps == [0, 2, 5, 10, 19, 36, *range(53, 60)]


def test_where_texts_do_not_repeat_the_prompts_of_most_new_requests_are_not_even_indexed() -> None:
    """A request that rests has cost nothing but the look at a counter."""
    cache = Watched()
    texts = Retrieval(cache, longest_pause=16)
    for i in range(60):
        output = [1000 + i]
        for step in range(12):
            texts.look_up(f"r{i}", state([1, 2], output), most=4)
            output.append(5000 + 100 * i + step)
        texts.forget([f"r{i}"])
    assert cache.prompts < 30
    assert cache.prompts >= 60 // TRY


def test_the_memory_of_long_answers_and_prompts_is_bounded() -> None:
    """The oldest answers go; a prompt for which there is no room is not searched."""
    cache = Watched()
    texts = Retrieval(cache, longest_pause=0, tokens=100)
    for i in range(6):
        texts.look_up(f"r{i}", state([1], [*range(100 * i, 100 * i + 40)]), most=0)
        texts.forget([f"r{i}"])
    assert list(cache.cached_requests) == ["r4", "r5"]
    texts.look_up("again", state([2, 400, 401], []), most=0)
    assert texts.look_up("again", state([2, 400, 401], [402, 403]), most=1) is not None
    texts.forget(["again"])
    assert texts.look_up("long", state([*range(98)], [0, 1]), most=1) is not None
    assert texts.look_up("longer", state([*range(98)], [0, 1]), most=1) is None
    assert cache.prompts == 8
    texts.forget(["long"])
    assert texts.look_up("longer", state([*range(98)], [0, 1]), most=1) is not None
    texts.look_up("endless", state([1], [*range(100)]), most=0)
    texts.forget(["longer", "endless"])
    texts.look_up("a", state([1], [*range(99)]), most=0)
    texts.forget(["a"])
    assert list(cache.cached_requests) == ["a"]


def test_off_and_a_missing_package_mean_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    assert suffix_cache("off") is None
    monkeypatch.setitem(__import__("sys").modules, "arctic_inference.suffix_decoding", None)
    assert suffix_cache("all") is None
