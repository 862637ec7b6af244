"""The reference head computes what the published implementation computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published import golden, published_folder
from safetensors.torch import load_file
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2.checkpoint import load_head
from clover_vllm.heads.clover2.convert import convert
from clover_vllm.heads.clover2.model import Clover2DraftModel


@pytest.fixture(params=["single", "sharded", "bin"])
def converted(request: pytest.FixtureRequest, tmp_path: Path) -> Clover2DraftModel:
    source = published_folder(tmp_path / "published", request.param)
    if request.param == "sharded":
        assert len(list(source.glob("*.safetensors"))) > 1
    convert(source, tmp_path / "head")
    return load_head(tmp_path / "head")


def test_teacher_forced_states_equal_golden(converted: Clover2DraftModel) -> None:
    t = golden()
    lm_head, ids = t["checkpoint.lm_head.weight"], t["input.next_token_ids"]
    embeds = lm_head[ids]
    g = converted.augment(t["input.hidden_states"], embeds)[0]
    for i in range(5):
        rows = 12 - i
        states = converted.draft_states(g[:rows], [embeds[0, j : j + rows] for j in range(1, i + 1)])
        torch.testing.assert_close(states[i], t["output.hidden_states"][i, 0, :rows], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            states[i] @ lm_head.T, t["output.logits"][i, 0, :rows], atol=1e-5, rtol=1e-5
        )


def test_stepwise_states_equal_golden(converted: Clover2DraftModel) -> None:
    t = golden()
    embeds = t["checkpoint.lm_head.weight"][t["input.next_token_ids"]]
    cache = converted.new_cache()
    for position in range(12):
        one = slice(position, position + 1)
        g = converted.augment(t["input.hidden_states"][:, one], embeds[:, one], cache)[0, 0]
        torch.testing.assert_close(
            converted.first(g), t["output.hidden_states"][0, 0, position], atol=1e-5, rtol=0
        )
        r = g
        for i in range(1, min(5, 12 - position)):
            r, s = converted.advance(r, embeds[0, position + i])
            torch.testing.assert_close(s, t["output.hidden_states"][i, 0, position], atol=1e-5, rtol=0)


def test_converted_checkpoint_rotates_with_base_10000_and_carries_no_lm_head(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "published", "single")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0}))
    convert(source, tmp_path / "head")
    head = load_head(tmp_path / "head")
    assert head.config.rope_parameters["rope_theta"] == 10000.0
    names = load_file(tmp_path / "head" / "model.safetensors").keys()
    assert not [n for n in names if "lm_head" in n or "embed" in n]


def test_what_a_published_config_says_is_read_or_refused(tmp_path: Path) -> None:
    source = published_folder(tmp_path / "published", "single")
    place = source / "config.json"
    fields = json.loads(place.read_text())
    linear = {"type": "linear", "factor": 4.0}
    wrong = {"hidden_act": "gelu", "rope_scaling": linear, "num_heads": 0}
    for name, value in wrong.items():
        place.write_text(json.dumps(fields | {name: value}))
        with pytest.raises(UserError, match=name) as caught:
            convert(source, tmp_path / "head")
        one_sentence(caught.value)
    assert not (tmp_path / "head").exists()
    fields.pop("rms_norm_eps")
    place.write_text(json.dumps(fields | {"num_heads": 3, "hidden_act": "silu", "rope_scaling": None}))
    config = convert(source, tmp_path / "head")
    assert (config.num_heads, config.rms_norm_eps) == (3, 1e-6)
