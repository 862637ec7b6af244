"""A batch that is killed and begun again answers what `vllm run-batch` answers, without Clover-2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chats import TINY_FLAGS, chat_lines
from engines import Script, run_script
from pairs import make_pair
from small import add_tokenizer


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
    requests = chat_lines(30)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests))
    flags = ["--model", str(target), *TINY_FLAGS]
    spec: dict[str, Any] = {"input": str(tmp_path / "in.jsonl"), "flags": flags}
    run_script("run_batch", {**spec, "output": str(tmp_path / "plain.jsonl"), "reference": True})
    drafting = [*flags, "--speculative-config", json.dumps({"model": str(head)})]
    spec |= {"output": str(tmp_path / "out.jsonl"), "flags": drafting}
    part = tmp_path / "out.jsonl.part"
    with Script("run_batch", spec) as killed:
        while not (part.exists() and part.read_text().count("\n") > 4):
            assert not killed.ended(0.02), killed.log()
    left = part.read_text().count("\n") - 1
    assert 4 <= left < 30
    with part.open("a") as file:
        file.write('{"line": 9, "answ')  # as if it had been killed in the middle of a write
    done = run_script("run_batch", spec)
    assert done == {"answers": 30, "by_an_earlier_run": left, "refused_by_the_engine": 1, "bad_lines": 0}
    assert said(tmp_path / "out.jsonl") == said(tmp_path / "plain.jsonl")
    assert [line[0] for line in said(tmp_path / "out.jsonl")] == [line["custom_id"] for line in requests]
    assert not part.exists()
