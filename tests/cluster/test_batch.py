"""A batch that is killed and begun again answers what `vllm run-batch` answers, without Clover-2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engines import Script, run_script
from pairs import make_pair
from small import add_tokenizer

FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"]
FLAGS += ["--num-gpu-blocks-override", "256", "--block-size", "32", "--served-model-name", "small"]


def lines(count: int) -> list[dict[str, Any]]:
    """Greedy and seeded chats; some with several samples or logprobs, one that is refused."""
    made = []
    for i in range(count):
        content = " ".join(f"t{3 + (17 * i + 5 * j) % 200}" for j in range(8))
        body: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": 30, "ignore_eos": True}
        body |= {"temperature": 0.8, "seed": i, "n": 1 + i % 3} if i % 2 else {"temperature": 0}
        body |= {"logprobs": True} if i % 5 == 0 else {}
        body |= {"top_p": 9} if i == 4 else {}
        made.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body})
    return made


def said(path: Path) -> list[tuple[Any, ...]]:
    """By line: its id, status, and texts, ends and tokens."""
    found = []
    for line in map(json.loads, path.read_text().splitlines()):
        body = line["response"]["body"]
        choices = body and [
            (
                c["message"]["content"],
                c["finish_reason"],
                [t["token"] for t in (c["logprobs"] or {}).get("content", [])],
            )
            for c in body["choices"]
        ]
        found.append((line["custom_id"], line["response"]["status_code"], choices, line["error"]))
    return found


def test_a_killed_batch_goes_on_and_says_what_run_batch_says(tmp_path: Path) -> None:
    target, head = make_pair(tmp_path, "llama tied")
    add_tokenizer(target)
    requests = lines(18)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests))
    flags = ["--model", str(target), *FLAGS]
    spec: dict[str, Any] = {"input": str(tmp_path / "in.jsonl"), "flags": flags}
    run_script("run_batch", {**spec, "output": str(tmp_path / "plain.jsonl"), "reference": True})
    drafting = [*flags, "--speculative-config", json.dumps({"model": str(head)})]
    spec |= {"output": str(tmp_path / "out.jsonl"), "flags": drafting}
    part = tmp_path / "out.jsonl.part"
    with Script("run_batch", spec) as killed:
        while not (part.exists() and part.read_text().count("\n") > 4):
            assert not killed.ended(0.02), killed.log()
    left = part.read_text().count("\n") - 1
    assert 4 <= left < 18
    with part.open("a") as file:
        file.write('{"line": 9, "answ')  # as if it had been killed in the middle of a write
    done = run_script("run_batch", spec)
    assert done == {"answers": 18, "by_an_earlier_run": left, "refused_by_the_engine": 1, "bad_lines": 0}
    assert said(tmp_path / "out.jsonl") == said(tmp_path / "plain.jsonl")
    assert [line[0] for line in said(tmp_path / "out.jsonl")] == [line["custom_id"] for line in requests]
    assert not part.exists()
