"""Damaged heads and configurations: each either works, or is refused in one sentence, and soon."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from configure import configuration
from safetensors.torch import load_file, save_file
from small import one_sentence, tiny_llama

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2 import Clover2Config, Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import load_head, save_head
from clover_vllm.heads.registry import check_head

ODD_VALUES: list[Any] = [
    None,
    -1,
    0,
    1,
    2,
    3,
    64,
    2**40,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    1e-300,
    "x",
    "",
    "64",
    [],
    {},
    [1],
    {"rope_type": "default"},
    True,
    False,
    "../..",
    "💥",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head with a draft vocabulary."""
    torch.manual_seed(0)
    config = Clover2Config(num_attention_heads=2, draft_vocab_size=20)
    head = Clover2DraftModel(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head.draft_vocab = torch.arange(0, 100, 5)
    folder = tmp_path_factory.mktemp("whole") / "head"
    save_head(head, folder)
    return folder


def damage_bytes(rng: random.Random, path: Path) -> None:
    """Flip, cut, repeat or insert bytes."""
    data = bytearray(path.read_bytes())
    kind = rng.randrange(5)
    at = rng.randrange(min(len(data), rng.choice([16, 400, 10**9])))
    if kind == 0:
        for _ in range(rng.choice([1, 1, 8, 100])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.choice([1, 8, 300]))
    elif kind == 3:
        data[at : at + 8] = rng.randbytes(8)
    else:
        data += data[:at]
    path.write_bytes(bytes(data))


def damage_config(rng: random.Random, path: Path) -> None:
    """Change, remove and add fields."""
    fields = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        name = rng.choice([*fields, "surprise", "head_dim", "rope_parameters", "draft_vocab_size"])
        if rng.random() < 0.2:
            fields.pop(name, None)
        else:
            fields[name] = rng.choice(ODD_VALUES)
    path.write_text(json.dumps(fields))


def damage_tensors(rng: random.Random, path: Path) -> None:
    """Drop, rename, reshape, retype and poison tensors."""
    tensors = load_file(path)
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(sorted(tensors))
        tensor = tensors.pop(name)
        kind = rng.randrange(7)
        if kind == 1:
            tensors[name + rng.choice(["x", ".weight", "💥"])] = tensor
        elif kind == 2:
            tensors[name] = tensor.flatten()
        elif kind == 3:
            kinds = (torch.float16, torch.float64, torch.int8, torch.bool, torch.float8_e4m3fn)
            tensors[name] = tensor.to(rng.choice(kinds))
        elif kind == 4:
            tensors[name] = tensor.clone()
            if tensor.is_floating_point():
                tensors[name].view(-1)[0] = rng.choice([float("nan"), float("inf"), 3e38])
            else:
                tensors[name].view(-1)[0] = rng.choice([-1, 2**40])
        elif kind == 5:
            tensors[name] = tensor[: tensor.shape[0] // 2].clone()
        elif kind == 6:
            tensors[name] = torch.zeros(0)
        if not tensors:
            tensors["nothing"] = torch.zeros(1)
    save_file(tensors, path)


def load_in_vllm(target: Path, head: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The head as a worker loads it, from the user's options to the last weight."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator
    from vllm.utils.torch_utils import set_default_torch_dtype

    made = configuration(
        target, {"method": "clover2", "model": str(head)}, dtype=dtype, enforce_eager=True, block_size=32
    )
    with set_current_vllm_config(made), set_default_torch_dtype(dtype):
        model = initialize_model(made, model_config=made.speculative_config.draft_model_config)
    model.load_weights(safetensors_weights_iterator([str(head / "model.safetensors")], False))
    return model


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """vLLM's process groups for a single rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(VllmConfig()):
        parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/ranks", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
    yield
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.timeout(900)
def test_damaged_heads_work_or_are_refused(whole: Path, tmp_path: Path) -> None:
    """By the reference model, and whatever that takes by vLLM's loader too."""
    worked = refused = loaded = 0
    target = tiny_llama(tmp_path / "target", vocab=101, hidden=64)
    for seed in range(350):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        shutil.copytree(whole, folder)
        config, weights = folder / "config.json", folder / "model.safetensors"
        damage, path = rng.choice(
            [
                (damage_bytes, config),
                (damage_bytes, weights),
                (damage_config, config),
                (damage_config, config),
                (damage_tensors, weights),
                (damage_tensors, weights),
            ]
        )
        damage(rng, path)
        dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
        try:
            check_head(folder, dtype)
        except UserError as error:
            refused += 1
            one_sentence(error)
            continue
        worked += 1
        head = load_head(folder)
        size = head.config.hidden_size
        g = head.augment(torch.randn(1, 3, size), torch.randn(1, 3, size))
        assert head.first(g).shape == (1, 3, size), seed
        try:
            load_in_vllm(target, folder, dtype)
            loaded += 1
        except UserError as error:  # sound, but another target's
            one_sentence(error)
        shutil.rmtree(folder)
    assert worked > 30
    assert loaded > 20
    assert refused > 150


def odd_options(rng: random.Random, head: Path) -> dict[str, Any]:
    """A speculative configuration with a few odd fields."""
    given: dict[str, Any] = {"method": "clover2", "model": str(head), "num_speculative_tokens": 8}
    names = [
        "num_speculative_tokens",
        "model",
        "tree",
        "draft_rounds",
        "draft_width",
        "draft_candidates",
        "draft_top_p",
        "draft_min_share",
        "draft_min_joint",
        "quantization",
        "draft_tensor_parallel_size",
        "revision",
        "disable_eagle_block_drop",
        "surprise",
        "prompt_lookup_max",
    ]
    paths = [
        [[0]],
        [[0], [0, 0]],
        [[0, 0]],
        [[1.5]],
        [["0"]],
        [0],
        [[-1]],
        [[]],
        "chain",
        "published",
        "best_first",
    ]
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(names)
        sane = paths if name == "tree" else [1, 2, 5, 0.5, 0.9]
        given[name] = rng.choice([*ODD_VALUES, *sane, *sane, *sane])
    return given


@pytest.mark.timeout(600)
def test_odd_configurations_work_or_are_refused(tmp_path: Path) -> None:
    """Through vLLM's own EngineArgs, so before an engine starts."""
    from clover_vllm.check.tiny import make_tiny_pair

    target, head = make_tiny_pair(tmp_path)
    worked = refused = 0
    for seed in range(150):
        given = odd_options(random.Random(seed), head)
        try:
            made = configuration(target, given)
        except UserError as error:
            refused += 1
            one_sentence(error)
            continue
        worked += 1
        spec = made.speculative_config
        assert 1 <= spec.num_speculative_tokens <= 63
        assert spec.clover.rounds(8) >= 1
    assert worked > 10
    assert refused > 80
