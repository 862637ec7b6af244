"""The table of refusals: one sentence each, the same at start and in the worker, and complete in the docs."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.engine import support
from clover_vllm.engine.config import check_fits
from clover_vllm.engine.options import METHOD
from clover_vllm.engine.support import REFUSALS, Refusal, Setup, check_supported, refusal_table, refuse_trees


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


def test_each_refusal_can_be_found_somewhere() -> None:
    names = [refusal.what for refusal in REFUSALS]
    assert len(set(names)) == len(names)
    assert all(refusal.detect is not None or refusal.in_worker for refusal in REFUSALS)


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
    setup = cast(Setup, SimpleNamespace())
    check_supported(setup, trees=False)
    with pytest.raises(UserError, match="fog"):
        check_supported(setup, trees=True)


def test_a_head_that_reads_layers_which_the_target_lacks_is_refused() -> None:
    sizes = {"hidden_size": 8, "vocab_size": 9, "target": "another"}
    target = SimpleNamespace(
        get_hidden_size=lambda: 8, get_vocab_size=lambda: 9, get_total_num_hidden_layers=lambda: 4
    )
    check_fits(
        cast(Any, SimpleNamespace(model_type=METHOD, target_layers=[1, 3], **sizes)), cast(Any, target)
    )
    head = SimpleNamespace(model_type=METHOD, target_layers=[1, 4], **sizes)
    with pytest.raises(UserError, match=r"layers \[1, 4\]") as caught:
        check_fits(cast(Any, head), cast(Any, target))
    one_sentence(caught.value)
