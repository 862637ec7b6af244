"""Fixtures: a small random target, answers for it, and a home of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clover_vllm.head import Clover2Config, Clover2DraftModel
from clover_vllm.head.init import config_for_target, init_from_target
from clover_vllm.target import make_target
from clover_vllm.train.target_model import FrozenTarget

DATA = Path(__file__).parent / "data"
VOCAB = 211


@pytest.fixture(scope="session")
def clover_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLOVER_HOME of commands that tests start; targets are shared with the user's, which are checked."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_home(clover_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOVER_HOME", str(clover_home))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real target, in the user's CLOVER_HOME: made once per machine."""
    return make_target("smollm2-135m")


def tiny_llama(folder: Path, seed: int = 0, vocab: int = VOCAB, hidden: int = 128) -> Path:
    """A random two-layer Llama whose greedy answers are not constant."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=hidden // 32,  # heads of 32 channels are the smallest that vLLM's CPU build has
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="session")
def frozen(tiny_target: Path) -> FrozenTarget:
    return FrozenTarget(tiny_target, torch.float32)


def write_answers(path: Path, frozen: FrozenTarget, count: int, seed: int = 0) -> Path:
    """Greedy answers of a target to random prompts, in the file form that `data` writes."""
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for index in range(count):
        length = int(torch.randint(3, 9, (1,), generator=generator))
        prompt = torch.randint(3, VOCAB, (length,), generator=generator)
        ids = prompt.tolist()
        wanted = int(torch.randint(4, 24, (1,), generator=generator))
        for _ in range(wanted):
            hidden = frozen.hidden_states(torch.tensor([ids]))
            ids.append(int((frozen.norm(hidden)[0, -1] @ frozen.lm_head.T).argmax()))
        lines.append(
            {
                "source": f"kind{index % 3}",
                "temperature": 0.0,
                "prompt_ids": prompt.tolist(),
                "answer_ids": ids[length:],
                "finish": "length",
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def tiny_answers(tmp_path_factory: pytest.TempPathFactory, frozen: FrozenTarget) -> Path:
    return write_answers(tmp_path_factory.mktemp("answers") / "answers.jsonl", frozen, 60)


@pytest.fixture
def head() -> Clover2DraftModel:
    """A random head of the golden checkpoint's sizes."""
    torch.manual_seed(0)
    model = Clover2DraftModel(Clover2Config(num_key_value_heads=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def fitting_head(frozen: FrozenTarget) -> Clover2DraftModel:
    """An untrained head for the tiny target."""
    head = Clover2DraftModel(config_for_target(frozen.config, target="tiny"))
    init_from_target(head, frozen.layers, frozen.norm)
    return head


def one_sentence(error: BaseException | str) -> None:
    """The form of every message to users: one line that ends like a sentence."""
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert "Traceback" not in text
