"""A Ray cluster of this machine, with stand-ins for engines; `engines.Script` starts it.

`main` takes {"folder": for notes, "what": "serve" or "batch"} and returns what a test looks at.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def main(spec: Json) -> Json:
    set_environment()
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    folder = Path(spec["folder"])
    return batch(folder) if spec["what"] == "batch" else serve_and_kill(folder)


def set_environment() -> None:
    """For a cluster of a test: a token of its own, and not one in the user's home."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_process_group_cleanup_enabled="1")
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def batch(folder: Path) -> Json:
    """100 lines through two actors, one of which kills the actor that is asked it first."""
    from batch_stand_ins import StandInAnswerer

    from clover_vllm.cluster.batch import BatchSettings, Request
    from clover_vllm.cluster.through_ray import answered

    requests = [
        Request(i, name, json.dumps({"custom_id": name}))
        for i in range(1, 101)
        for name in [f"{'fatal' if i % 70 == 0 else 'r'}{i}"]
    ]
    settings = BatchSettings(folder, folder, ("--model", str(folder)), at_once=32, ray=True, replicas=2)
    found = list(answered(settings, requests, StandInAnswerer))
    asked = (folder / "asked").read_text().split()
    return {
        "batch": sorted((line, json.loads(answer)["custom_id"]) for line, answer in found),
        "batch_asked": len(asked),
        "batch_distinct": len(set(asked)),
    }


def serve_and_kill(folder: Path) -> Json:
    """Two replicas, which are killed while they answer through our ingress, and through Ray's."""
    import httpx
    import psutil
    from ray import serve
    from ray.serve.llm.ingress import OpenAiIngress
    from ray.serve.llm.openai_api_models import ChatCompletionRequest

    from clover_vllm.cluster.serving import build

    model = {
        "model_loading_config": {"model_id": "small", "model_source": "none"},
        "accelerator_config": {"kind": "cpu"},
        "placement_group_config": {"bundle_per_worker": {"CPU": 1}},
        "server_cls": "stand_ins:StandInServer",
        "engine_kwargs": {"max_num_seqs": 64},
        "runtime_env": {"env_vars": {"STAND_IN_FOLDER": str(folder)}},
        "deployment_config": {"num_replicas": 2},
    }

    def is_alive(pid: int) -> bool:
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    def replicas() -> dict[int, Json]:
        """Those that live, by process id."""
        made = {int(p.stem): json.loads(p.read_text()) for p in folder.glob("*.json")}
        return {pid: note for pid, note in made.items() if is_alive(pid)}

    def ask(number: int, stream: bool) -> tuple[int, str]:
        answer = httpx.post(f"{url}/v1/chat/completions", json=chat(number, stream), timeout=120)
        if stream or answer.status_code != 200:
            return answer.status_code, answer.text
        return 200, str(answer.json()["choices"][0]["message"]["content"])

    def ask_rays(number: int) -> bool:
        """Whether Ray's own ingress, made here, answers."""
        handle = serve.get_deployment_handle("StandInServer:small", "default")
        ingress = OpenAiIngress({"small": handle}, {"small": None})
        body = ChatCompletionRequest.model_validate(chat(number, False))
        try:
            return asyncio.run(ingress._process_llm_request(body, "chat")).status_code == 200
        except Exception:
            return False

    gone: list[int] = []

    def while_asked(harm: Callable[[int], None]) -> Json:
        for file in folder.glob("begun-*"):
            file.unlink()
        with ThreadPoolExecutor(24) as pool:
            asked = [pool.submit(ask, i, False) for i in range(8)]
            streams = [pool.submit(ask, i, True) for i in range(8, 16)]
            rays = [pool.submit(ask_rays, i) for i in range(16, 24)]
            victim = wait_until_busy()
            gone.append(replicas()[victim]["child"])
            time.sleep(0.3)  # until what has begun has gone out
            harm(victim)
            return {
                "answers": [future.result() for future in asked],
                "streams": [future.result() for future in streams],
                "rays": [future.result() for future in rays],
            }

    def wait_until_busy() -> int:
        """A replica that is in the middle of requests of all three kinds."""
        until = time.monotonic() + 100
        while time.monotonic() < until:
            for pid in replicas():
                begun = folder / f"begun-{pid}"
                numbers = [int(line[1:]) for line in begun.read_text().split()] if begun.exists() else []
                if {number // 8 for number in numbers} == {0, 1, 2}:
                    return pid
            time.sleep(0.05)
        raise AssertionError("no replica was asked for all of it")

    url = f"http://127.0.0.1:{free_port()}"
    serve.start(http_options={"port": int(url.rpartition(":")[2])})
    serve.run(build({"llm_configs": [model], "ingress_deployment_config": {"num_replicas": 1}}))
    found: Json = {
        "cores": sorted(note["cores"] for note in replicas().values()),
        "whole_stream": ask(0, stream=True)[1],
        "killed": while_asked(lambda pid: psutil.Process(pid).kill()),
    }
    until = time.monotonic() + 100
    while len(replicas()) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    found["died"] = while_asked(lambda pid: (folder / f"die-{pid}").touch())
    until = time.monotonic() + 20
    while any(map(is_alive, gone)) and time.monotonic() < until:
        time.sleep(0.2)
    return found | {"orphans": [pid for pid in gone if is_alive(pid)], "victims": len(gone)}


def chat(number: int, stream: bool) -> Json:
    return {"model": "small", "messages": [{"role": "user", "content": f"q{number}"}], "stream": stream}


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
