"""The default target: made atomically, verified, and the same through transformers and vLLM."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import run_script
from length import length
from transformers import AutoModelForCausalLM, AutoTokenizer

from clover_vllm.base.errors import UserError
from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.checkpoint import save_head
from clover_vllm.target.frozen import FrozenTarget
from clover_vllm.target.make import make_target

PROMPTS = [
    "Why is the sky blue?",
    "Write a Python function that reverses a string.",
    "What is 17 times 23?",
    "Name three rivers in Europe and say where they end.",
    "Tell me a joke about a penguin.",
    "How do I boil an egg?",
]


def _start(folder: Path) -> subprocess.Popen[bytes]:
    code = f"from clover_vllm.target.make import make_target; make_target('smollm2-135m', __import__('pathlib').Path({str(folder)!r}))"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_kill_leaves_nothing_or_a_whole_folder(smollm2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "target"
    rng = random.Random(11)
    for _ in range(length(1, 4)):
        process = _start(folder)
        time.sleep(rng.uniform(2.0, 9.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if folder.exists():
            assert (folder / "clover-target.json").exists()
    # Killed, damaged and mended is as good as made.
    shutil.copytree(smollm2, folder, dirs_exist_ok=True)
    damaged = folder / "tokenizer.json"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    make_target("smollm2-135m", folder)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["target"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in smollm2.iterdir())
    # Made twice, the same bytes: nothing in it depends on when or where it was made.
    assert (folder / "clover-target.json").read_text() == (smollm2 / "clover-target.json").read_text()
    assert damaged.read_bytes() == (smollm2 / "tokenizer.json").read_bytes()


def test_folder_is_complete(smollm2: Path) -> None:
    names = {p.name for p in smollm2.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>assistant\n")
    assert json.loads((smollm2 / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.engine
def test_greedy_answers_through_transformers_and_vllm_are_the_same(smollm2: Path) -> None:
    asked = PROMPTS[: length(4, len(PROMPTS))]
    through_vllm = run_script("run_chat", {"target": str(smollm2), "prompts": asked})
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for prompt, answer in zip(asked, through_vllm, strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == answer


def test_a_head_is_no_target(fitting_head: Clover2DraftModel, tmp_path: Path) -> None:
    save_head(fitting_head, tmp_path / "head")
    with pytest.raises(UserError, match="is a draft head, not a target"):
        FrozenTarget(tmp_path / "head", torch.float32)
