"""Clover and Medusa heads in the engine: their trees are the reference model's, and texts are plain vLLM's (float32)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines import Json, differing, run_engine, tokens_of
from pairs import VOCAB, llm, make_pair, random_requests
from small import one_sentence
from vllm.config import ModelConfig, ParallelConfig
from vllm.engine.arg_utils import EngineArgs

from clover_vllm.base.errors import UserError
from clover_vllm.engine.support import Setup, check_supported
from clover_vllm.heads.base import NewHead
from clover_vllm.heads.medusa.config import MedusaTreesConfig
from clover_vllm.heads.medusa.model import MedusaTreesDraftModel
from clover_vllm.heads.registry import HEADS, kind_of
from clover_vllm.heads.saved import SavedHead
from clover_vllm.target.frozen import FrozenTarget

HEADS_MADE = ["clover1", "medusa", "medusa with output layers"]


def requests() -> list[Json]:
    """Greedy ones, and seeded ones."""
    return [*random_requests(12), *random_requests(8, temperature=0.9, top_p=0.9, seed=5)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("other"), "llama tied")[0]


@pytest.fixture(scope="module")
def plain(target: Path) -> Json:
    return run_engine(llm(target, max_num_batched_tokens=4096), requests())


@pytest.fixture(params=HEADS_MADE)
def folder(request: pytest.FixtureRequest, target: Path, tmp_path: Path) -> Path:
    """A head with weights of no sense, so that each part of it counts."""
    torch.manual_seed(7)
    frozen = FrozenTarget(target, torch.float32)
    if request.param in HEADS:
        ids = torch.randint(3, VOCAB, (1, 20))
        vocab = torch.randperm(VOCAB)[:90].sort().values
        wanted = NewHead(4, vocab, frozen.hidden_states(ids)[0], ids[0], scale_inputs=True, seed=0)
        head = HEADS[request.param].head_class().new(frozen, wanted)
    else:
        sizes = MedusaTreesConfig(128, VOCAB, num_heads=3, num_hidden_layers=2, own_lm_heads=True)
        head = MedusaTreesDraftModel(sizes)
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
    for parameter in head.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert isinstance(head, SavedHead)
    head.write(tmp_path / "head", torch.float32)
    return tmp_path / "head"


def test_trees_are_the_references_and_change_nothing(target: Path, folder: Path, plain: Json) -> None:
    """Half of the trees are the head's, half hide the right text: greedy and seeded, prompts in chunks,
    preemptions, prefix hits. The method is inferred from the head."""
    speculative = {"tree": "best_first", "num_speculative_tokens": 8, "draft_min_joint": 0.0}
    run = run_engine(
        llm(
            target,
            max_num_batched_tokens=48,
            num_gpu_blocks_override=16,
            speculative_config={"model": str(folder), **speculative},
        ),
        requests(),
        scripted={"answers": tokens_of(plain), "seed": 5, "share": 0.5},
        check_trees=str(folder),
    )
    stats = run["stats"]
    assert stats["worker"] == "CloverCPUWorker"
    assert stats["trees_compared"] > 100
    assert stats["tree_error"] < 1e-4
    assert stats["verified"]["branching"] > 100
    assert stats["accepted_in"]["branching"] > 30
    assert stats["preempted"] > 0
    assert stats["cached_tokens"] > 0
    assert stats["leaked_blocks"] == 0
    assert differing(plain, run) == 0


@pytest.mark.parametrize("folder", HEADS_MADE[:2], indirect=True)
def test_adaptive_trees_change_nothing(target: Path, folder: Path, plain: Json) -> None:
    """Sized at random, drafting now and then, compiled where the head has what is worth it; half of the trees hide the
    right text."""
    compiled = "medusa" not in json.loads((folder / "config.json").read_text())["model_type"]
    run = run_engine(
        llm(
            target, enforce_eager=not compiled, speculative_config={"method": "clover2", "model": str(folder)}
        ),
        requests(),
        scripted={"answers": tokens_of(plain), "seed": 6, "share": 0.5},
        restless=3,
    )
    stats = run["stats"]
    assert stats["compiled"] == compiled
    assert stats["sources"]["nodes"]["head"] > 50
    assert stats["accepted_in"]["branching"] > 30
    assert stats["leaked_blocks"] == 0
    assert differing(plain, run) == 0


@pytest.mark.parametrize("folder", HEADS_MADE[:2], indirect=True)
def test_the_v2_runner_is_refused(target: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded: its drafting knows Clover-2 heads alone."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    head = kind_of(folder).head_class().load(folder).config
    model = ModelConfig(str(target), skip_tokenizer_init=True)
    setup = Setup(model, ParallelConfig(), "cpu", EngineArgs(str(target)), head)
    with pytest.raises(UserError, match="VLLM_USE_V2_MODEL_RUNNER=0") as caught:
        check_supported(setup, trees=True)
    one_sentence(caught.value)
