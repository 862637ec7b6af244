"""The table of refusals: one sentence each, the same at start and in the worker, and complete in the docs."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.engine import support
from clover_vllm.engine.support import (
    REFUSALS,
    Refusal,
    Setup,
    check_step,
    check_supported,
    refusal_table,
    refuse_found,
    refuse_trees,
)


def test_every_refusal_is_one_sentence_that_says_what_to_do() -> None:
    for refusal in REFUSALS:
        text = str(refusal.error())
        one_sentence(text)
        assert refusal.what in text
        assert refusal.instead in text.partition(";")[2]
        assert ('"chain"' in text) == refusal.trees_only


def test_a_detail_stands_behind_the_name() -> None:
    assert "with the KV cache type fp8;" in str(refuse_trees("the KV cache type", "fp8"))


def test_what_is_not_in_the_table_cannot_be_refused() -> None:
    with pytest.raises(KeyError):
        refuse_trees("bad weather")
    with pytest.raises(AssertionError):
        refuse_trees("pipeline parallelism")
    with pytest.raises(KeyError):
        refuse_found({"ALiBi": False, "bad weather": False})


def test_each_refusal_can_be_found_somewhere() -> None:
    names = [refusal.what for refusal in REFUSALS]
    assert len(set(names)) == len(names)
    assert all(refusal.found for refusal in REFUSALS)


def test_the_rendered_table_has_a_row_per_refusal() -> None:
    header, _, *rows = refusal_table().splitlines()
    assert len(rows) == len(REFUSALS)
    for row, refusal in zip(rows, REFUSALS, strict=True):
        assert row.count(" | ") == header.count(" | ")
        assert re.match(rf"\| {re.escape(refusal.what)} \|", row)


def test_chains_are_not_refused_for_what_only_trees_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(_: Any) -> bool:
        return True

    monkeypatch.setattr(support, "REFUSALS", (Refusal("fog", "", "wait", found, trees_only=True),))
    setup = cast(Setup, SimpleNamespace(head=None))
    check_supported(setup, trees=False)
    with pytest.raises(UserError, match="fog"):
        check_supported(setup, trees=True)


HEAD = {
    "model_type": "clover2",
    "hidden_size": 8,
    "vocab_size": 9,
    "target": "another",
    "target_layers": [1, 3],
}


def check(ranks: int = 1, **head: Any) -> None:
    """A head of `HEAD`'s fields but for some, on a target that it fits."""
    target = SimpleNamespace(
        get_hidden_size=lambda: 8, get_vocab_size=lambda: 9, get_total_num_hidden_layers=lambda: 4
    )
    given = SimpleNamespace(**{**HEAD, **head})
    setup = SimpleNamespace(target=target, parallel=SimpleNamespace(tensor_parallel_size=ranks), head=given)
    check_supported(cast(Setup, setup), trees=True)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"model_type": "gpt2"}, "a draft model of model_type 'gpt2'"),
        ({"target_layers": [1, 4]}, r"layers \[1, 4\], where this one has 4 \(made for another\)"),
        ({"vocab_size": 7}, "vocab_size 7, where this one has 9"),
        ({"ranks": 2}, "earlier layers of the target"),
        ({"ranks": 2, "target_layers": [], "model_type": "clover1"}, "Clover and Medusa heads"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    head: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    check()
    check(ranks=2, target_layers=[])
    with pytest.raises(UserError, match=said) as caught:
        check(**head)
    one_sentence(caught.value)


def test_a_step_must_hold_more_than_a_tree() -> None:
    def config(rows: int, drop: bool) -> Any:
        spec = SimpleNamespace(disable_eagle_block_drop=drop, num_speculative_tokens=16)
        return SimpleNamespace(
            speculative_config=spec, scheduler_config=SimpleNamespace(max_num_batched_tokens=rows)
        )

    check_step(config(16, False))
    check_step(config(17, True))
    with pytest.raises(UserError, match=r"\(16 and 16\); raise --max-num-batched-tokens") as caught:
        check_step(config(16, True))
    one_sentence(caught.value)
