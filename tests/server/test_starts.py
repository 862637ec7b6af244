"""Other ways to start: several API server processes, `vllm run-batch`, options that do not exist."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import pytest
from engines import run_script

from clover_vllm.base.errors import UserError
from clover_vllm.base.paths import shipped_head
from clover_vllm.check.tiny import make_tiny_pair
from clover_vllm.launch.server import Server

FLAGS = ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4", "--dtype", "float32"]


def complete(server: Server) -> None:
    body = {"model": "small", "prompt": "the cat", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 16


def test_two_api_servers_export_the_same_metrics(tmp_path: Path) -> None:
    target, head = make_tiny_pair(tmp_path)
    with Server(str(target), {"model": str(head)}, [*FLAGS, "--api-server-count", "2"], "small") as server:
        server.wait(300)
        complete(server)
        for _ in range(4):  # connections spread over both processes
            found = server.counters()
            assert found["clover:tree_nodes_count"] > 0
            assert found["clover:tree_nodes_sum"] >= found["clover:tree_nodes_count"]
            assert found["clover:drafted_depth_total"] > 0
            assert found["clover:step_seconds_total"] > 0
            assert "clover:fallbacks_total" in found


def test_run_batch_takes_the_same_flag(tmp_path: Path) -> None:
    target, head = make_tiny_pair(tmp_path)
    messages = [{"role": "user", "content": "the cat"}]
    body = {"model": str(target), "messages": messages, "max_tokens": 12, "temperature": 0}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text(json.dumps(line) + "\n")
    command = ["run-batch", "-i", str(asked), "-o", str(answered)]
    command += ["--model", str(target), "--enforce-eager", "--max-model-len", "128", "--dtype", "float32"]
    command += ["--chat-template", str(template), "--speculative-config", json.dumps({"model": str(head)})]
    run_script("run_vllm", {"arguments": command}, env={"VLLM_CPU_KVCACHE_SPACE": "1"})
    (found,) = (json.loads(row) for row in answered.read_text().splitlines())
    assert found["error"] is None
    assert found["response"]["body"]["usage"]["completion_tokens"] > 0


def test_unknown_options_end_the_start_with_one_sentence(
    smollm2: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = {"method": "clover2", "model": str(shipped_head()), "draft_deepness": 3}
    with Server(str(smollm2), wrong, FLAGS) as server, pytest.raises(UserError):
        server.wait(300)
    shown = capfd.readouterr().err
    assert "'draft_deepness' does not exist for Clover-2" in shown
    assert "Known options" in shown
