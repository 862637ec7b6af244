"""Clover's metrics with several API server processes."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

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
