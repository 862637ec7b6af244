"""Clover's options in vLLM's speculative configuration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.engine.options import (
    OPTION_NAMES,
    CloverOptions,
    asks_for_clover,
    options_table,
    split_options,
)
from clover_vllm.tree import PUBLISHED_25

SHARED = ("method", "model", "num_speculative_tokens")


def test_own_options_are_separated_from_vllms() -> None:
    given = {"method": "clover2", "model": "head", "draft_rounds": 2, "tree": "chain"}
    shared, own = split_options(given, SHARED)
    assert shared == {"method": "clover2", "model": "head"}
    assert own == CloverOptions(tree="chain", draft_rounds=2)


def test_unknown_options_list_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        split_options({"model": "head", "draft_round": 2}, SHARED)
    text = str(caught.value)
    assert "Did you mean draft_rounds?" in text
    assert all(name in text for name in (*SHARED, *OPTION_NAMES))


@pytest.mark.parametrize(
    "values",
    [
        {"draft_rounds": 0},
        {"draft_rounds": 2.5},
        {"draft_width": 64},
        {"draft_candidates": True},
        {"draft_top_p": 0},
        {"draft_top_p": "0.9"},
        {"draft_min_share": 1.5},
        {"tree": "bushy"},
        {"tree": []},
        {"tree": [[0, 0]]},
        {"tree": [[0], [0]]},
        {"tree": [["a"]]},
        {"tree": 3},
    ],
)
def test_bad_values_are_refused_in_one_sentence(values: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        CloverOptions(**values)
    one_sentence(caught.value)


def test_fixed_trees_are_cut_to_the_number_of_nodes() -> None:
    assert CloverOptions().fixed_shape(8) is None
    chain = CloverOptions(tree="chain").fixed_shape(3)
    assert chain is not None
    assert chain.paths == [(0,), (0, 0), (0, 0, 0)]
    published = CloverOptions(tree="published").fixed_shape(25)
    assert published is not None
    assert published.paths == PUBLISHED_25.paths
    own = CloverOptions(tree=[[1], [0], [0, 0]]).fixed_shape(2)
    assert own is not None
    assert own.paths == [(0,), (1,)]


def test_configuration_asks_for_clover_by_method_or_by_the_head(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clover2"}))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert asks_for_clover({"method": "clover2", "model": "anything"})
    assert asks_for_clover({"model": str(tmp_path)})
    assert not asks_for_clover({"method": "eagle", "model": str(tmp_path)})
    assert not asks_for_clover({"model": str(other)})
    assert not asks_for_clover({"method": "ngram"})
    assert not asks_for_clover(None)


@pytest.mark.parametrize("name", ["{0}/missing", "~/missing", "./missing", "../missing", "some/where/head"])
def test_a_missing_folder_without_a_method_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="was not found") as caught:
        asks_for_clover({"model": name.format(tmp_path)})
    one_sentence(caught.value)


def test_a_missing_folder_beside_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the name could be one of the hub too, which does not know it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads").mkdir()
    with pytest.raises(UserError, match="'heads/missing', which was not found"):
        asks_for_clover({"model": "heads/missing"})
    with pytest.raises(UserError, match="'missing-head', which was not found"):
        asks_for_clover({"model": "missing-head"})
    for others in ("organisation/missing", "ngram", "[ngram]", "module.Proposer"):
        assert not asks_for_clover({"model": others})


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"without config\.json") as caught:
        asks_for_clover({"model": str(tmp_path)})
    one_sentence(caught.value)
    (tmp_path / "params.json").write_text("{}")  # Mistral's form
    assert not asks_for_clover({"model": str(tmp_path)})
    assert not asks_for_clover({"model": "s3://bucket/some/head"})


def test_every_option_is_documented_with_its_default() -> None:
    rows = options_table().splitlines()[2:]
    assert len(rows) == len(dataclasses.fields(CloverOptions))
    for row, field in zip(rows, dataclasses.fields(CloverOptions), strict=True):
        name, default, meaning = (cell.strip() for cell in row.strip("|").split(" | "))
        assert name == f"`{field.name}`"
        assert len(meaning.split()) > 5, f"{field.name} is not explained"
        assert "  " not in meaning
        if field.default is None:
            assert "by default" in meaning
        else:
            assert default == f"`{field.default}`"
