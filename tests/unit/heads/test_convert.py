"""Published Medusa and EAGLE-1 checkpoints convert, whatever their configs say, or are refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.heads.convert import convert
from clover_vllm.heads.eagle1.checkpoint import load_eagle1
from clover_vllm.heads.medusa.model import MedusaTreesDraftModel
from clover_vllm.heads.registry import kind_of
from clover_vllm.target.frozen import FrozenTarget

SIZE, VOCAB = 128, 211


def published_medusa(folder: Path, output_layers: bool, prefix: str = "") -> dict[str, torch.Tensor]:
    """Three heads of one block; the config says two, as the published one of Vicuna-7B does."""
    torch.manual_seed(0)
    tensors = {}
    for i in range(3):
        tensors[f"{i}.0.linear.weight"] = torch.randn(SIZE, SIZE) / 20
        tensors[f"{i}.0.linear.bias"] = torch.randn(SIZE) / 20
        if output_layers:
            tensors[f"{i}.1.weight"] = torch.randn(VOCAB, SIZE) / 10
    folder.mkdir()
    torch.save({prefix + name: t for name, t in tensors.items()}, folder / "medusa_lm_head.pt")
    fields = {"base_model_name_or_path": "x/y", "medusa_num_heads": 2, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(fields))
    return tensors


@pytest.mark.parametrize("prefix", ["", "medusa_head."])
@pytest.mark.parametrize("output_layers", [True, False])
def test_published_medusa_heads_compute_what_they_did(
    output_layers: bool, prefix: str, frozen: FrozenTarget, tmp_path: Path
) -> None:
    tensors = published_medusa(tmp_path / "published", output_layers, prefix)
    kind, config = convert(tmp_path / "published", tmp_path / "head", frozen.path)
    assert kind.method == kind_of(tmp_path / "head").method == "medusa"
    assert (config.num_heads, config.own_lm_heads) == (3, output_layers)
    assert config.target_probe is not None
    head = MedusaTreesDraftModel.load(tmp_path / "head")
    x = torch.randn(5, SIZE)
    states = head(x)
    for i in range(3):
        layer = tensors[f"{i}.0.linear.weight"]
        expected = x + torch.nn.functional.silu(x @ layer.T + tensors[f"{i}.0.linear.bias"])
        torch.testing.assert_close(states[i], expected)
        if output_layers:
            assert head.lm_heads is not None
            assert torch.equal(head.lm_heads[i], tensors[f"{i}.1.weight"])


def test_medusa_heads_that_cannot_be_told_are_refused(frozen: FrozenTarget, tmp_path: Path) -> None:
    tensors = published_medusa(tmp_path / "a", output_layers=False)
    with pytest.raises(UserError, match="--target") as caught:
        convert(tmp_path / "a", tmp_path / "head")
    one_sentence(caught.value)
    del tensors["1.0.linear.weight"]
    torch.save(tensors, tmp_path / "a" / "medusa_lm_head.pt")
    with pytest.raises(UserError, match=r"missing: heads\.1\.0\.linear\.weight") as caught:
        convert(tmp_path / "a", tmp_path / "head", frozen.path)
    one_sentence(caught.value)
    tensors = published_medusa(tmp_path / "b", output_layers=True)
    del tensors["2.1.weight"]
    torch.save(tensors, tmp_path / "b" / "medusa_lm_head.pt")
    with pytest.raises(UserError, match="one output layer") as caught:
        convert(tmp_path / "b", tmp_path / "head")
    one_sentence(caught.value)
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize("bias", [True, False])
def test_published_eagle1_heads_lose_only_the_targets_embeddings(
    bias: bool, frozen: FrozenTarget, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    source = tmp_path / "published"
    source.mkdir()
    sizes = {"mlp.gate_proj": (96, SIZE), "mlp.up_proj": (96, SIZE), "mlp.down_proj": (SIZE, 96)}
    sizes |= {"self_attn.q_proj": (SIZE, SIZE), "self_attn.o_proj": (SIZE, SIZE)}
    sizes |= {"self_attn.k_proj": (32, SIZE), "self_attn.v_proj": (32, SIZE)}
    tensors = {f"layers.0.{name}.weight": torch.randn(shape) for name, shape in sizes.items()}
    tensors["layers.0.post_attention_layernorm.weight"] = torch.ones(SIZE)
    tensors["fc.weight"] = torch.randn(SIZE, 2 * SIZE)
    if bias:
        tensors["fc.bias"] = torch.randn(SIZE)
    embeddings = frozen.embed_tokens.clone()
    save_file(tensors | {"embed_tokens.weight": embeddings}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(frozen.config.to_dict() | {"architectures": ["Other"]}))
    kind, _ = convert(source, tmp_path / "head", frozen.path)
    assert kind.method == kind_of(tmp_path / "head").method == "eagle1"
    head = load_eagle1(tmp_path / "head")
    assert head.state_dict().keys() == tensors.keys()
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in tensors.items())
    save_file(tensors | {"embed_tokens.weight": embeddings + 1}, source / "model.safetensors")
    with pytest.raises(UserError, match="embed_tokens") as caught:
        convert(source, tmp_path / "again", frozen.path)
    one_sentence(caught.value)
