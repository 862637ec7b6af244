"""Heads are written and read whole, or refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import one_sentence, tiny_llama

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2 import Clover2Config, Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import load_head, save_head
from clover_vllm.heads.weights import check_target, probe_lm_head
from clover_vllm.target.frozen import FrozenTarget


def test_saved_head_loads_with_the_same_weights(head: Clover2DraftModel, tmp_path: Path) -> None:
    save_head(head, tmp_path / "head", torch.float32)
    again = load_head(tmp_path / "head")
    assert again.config.to_dict() == head.config.to_dict()
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    x, e = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    assert torch.equal(again.augment(x, e), head.augment(x, e))


def test_large_head_is_sharded_and_loads(head: Clover2DraftModel, tmp_path: Path) -> None:
    save_head(head, tmp_path / "head", torch.float32, max_shard_size="60KB")
    assert len(list((tmp_path / "head").glob("*.safetensors"))) > 2
    again = load_head(tmp_path / "head")
    for name, tensor in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_saving_again_keeps_the_model_card(head: Clover2DraftModel, tmp_path: Path) -> None:
    save_head(head, tmp_path / "head", torch.float32, max_shard_size="60KB")
    (tmp_path / "head" / "README.md").write_text("card")
    save_head(head, tmp_path / "head")
    assert (tmp_path / "head" / "README.md").read_text() == "card"
    assert [p.name for p in (tmp_path / "head").glob("*.safetensors*")] == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["head"]


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["clover_head_mlp.weight"][3, 3] = float("nan")


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["clover_norm.weight"]


def _extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors["surprise"] = torch.zeros(3)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["clover_norm.weight"] = torch.zeros(65)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "other model": (lambda f: _edit_config(f, model_type="llama"), "not a Clover-2 head"),
    "impossible sizes": (lambda f: _edit_config(f, num_key_value_heads=3), "num_key_value_heads"),
    "text for a size": (lambda f: _edit_config(f, hidden_size="64"), "hidden_size"),
    "other sizes": (lambda f: _edit_config(f, intermediate_size=80), "mlp.down_proj"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "truncated weights": (_truncate, "damaged"),
    "NaN weights": (lambda f: _edit_tensors(f, _nan), "not finite"),
    "missing tensor": (lambda f: _edit_tensors(f, _drop), "missing: clover_norm.weight"),
    "unexpected tensor": (lambda f: _edit_tensors(f, _extra), "unexpected: surprise"),
    "misshapen tensor": (lambda f: _edit_tensors(f, _reshape), "of another shape: clover_norm"),
    "index without shards": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "missing",
    ),
    "index outside": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
        "outside",
    ),
    "index not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("?"), "index"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_head_is_refused_in_one_sentence(
    damage: str, head: Clover2DraftModel, tmp_path: Path
) -> None:
    folder = tmp_path / "head"
    save_head(head, folder, torch.float32)
    apply, named = DAMAGE[damage]
    apply(folder)
    with pytest.raises(UserError, match=named) as caught:
        load_head(folder)
    one_sentence(caught.value)


def test_hostile_bin_file_is_refused(head: Clover2DraftModel, tmp_path: Path) -> None:
    save_head(head, tmp_path / "head")
    (tmp_path / "head" / "model.safetensors").unlink()
    torch.save({"weights": Clover2Config()}, tmp_path / "head" / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        load_head(tmp_path / "head")
    one_sentence(caught.value)


@pytest.mark.parametrize(
    "ids", [torch.tensor([3, 2, 5]), torch.tensor([1, 2, 101]), torch.tensor([1, 2, 3], dtype=torch.int32)]
)
def test_draft_vocabulary_must_be_increasing_known_ids(ids: torch.Tensor, tmp_path: Path) -> None:
    head = Clover2DraftModel(Clover2Config(draft_vocab_size=3))
    head.draft_vocab = ids
    save_head(head, tmp_path / "head")
    with pytest.raises(UserError, match="draft_vocab") as caught:
        load_head(tmp_path / "head")
    one_sentence(caught.value)


def test_head_of_another_target_is_refused(frozen: FrozenTarget, tmp_path: Path) -> None:
    config = Clover2Config(
        hidden_size=128, vocab_size=211, target="tiny", target_probe=probe_lm_head(frozen.lm_head)
    )
    check_target(config, frozen.config, frozen.lm_head)
    check_target(config, frozen.config, frozen.lm_head * 1.03)  # as a fine-tuned copy would be
    other = FrozenTarget(tiny_llama(tmp_path / "wide", hidden=96), torch.float32)
    with pytest.raises(UserError, match="hidden_size") as caught:
        check_target(config, other.config, other.lm_head)
    one_sentence(caught.value)
    other = FrozenTarget(tiny_llama(tmp_path / "vocab", vocab=212), torch.float32)
    with pytest.raises(UserError, match="vocab_size"):
        check_target(config, other.config, other.lm_head)
    same_sizes = frozen.lm_head * torch.linspace(0.5, 2, 211)[:, None]
    with pytest.raises(UserError, match="another model's") as caught:
        check_target(config, frozen.config, same_sizes)
    one_sentence(caught.value)
