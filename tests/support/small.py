"""Small random targets, answers for them, and what every message to users looks like."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clover_vllm.heads.clover2 import Clover2DraftModel
from clover_vllm.heads.clover2.init import config_for_target, init_from_target
from clover_vllm.target.frozen import FrozenTarget

DATA = Path(__file__).parents[1] / "data"
VOCAB = 211


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


def add_tokenizer(folder: Path, vocab: int = VOCAB) -> Path:
    """Words t0, t1, ... for the tokens of a target, and a chat template that says a chat's words and no more."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t1", eos_token="t2", pad_token="t0", unk_token="t0"
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    made.save_pretrained(folder)
    return folder


def head_for(frozen: FrozenTarget) -> Clover2DraftModel:
    """An untrained head for a target."""
    head = Clover2DraftModel(config_for_target(frozen.config, target="tiny"))
    init_from_target(head, frozen.layers, frozen.norm)
    return head


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


def one_sentence(error: BaseException | str) -> None:
    """The form of every message to users: one line that ends like a sentence."""
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert "Traceback" not in text


def write_prompts(path: Path) -> Path:
    """200 prompts of `add_tokenizer`'s words."""
    rng = random.Random(0)
    words = [f"t{i}" for i in range(3, VOCAB)]
    lines = [{"prompt": " ".join(rng.choices(words, k=rng.randint(2, 9))), "source": "x"} for _ in range(200)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
