"""A Ray cluster of this machine, with stand-ins for engines; `engines.Script` starts it.

`main` takes {"folder": for notes, "what": "serve" or "batch"} and returns what a test looks at.
"""

from __future__ import annotations

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
    return {**batch(folder), **serve_and_kill(folder)}


def set_environment() -> None:
    """For a cluster of a test: a token of its own, and not one in the user's home."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_process_group_cleanup_enabled="1")
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def batch(folder: Path) -> Json:
    """200 lines through two actors, three of which kill the actor that is asked them first."""
    from stand_ins import StandInAnswerer

    from clover_vllm.cluster.batch import BatchSettings, Request
    from clover_vllm.cluster.through_ray import answered

    requests = [
        Request(i, name, json.dumps({"custom_id": name}))
        for i in range(1, 201)
        for name in [f"{'fatal' if i % 70 == 0 else 'r'}{i}"]
    ]
    settings = BatchSettings(folder, folder, ("--model", str(folder)), ray=True, replicas=2)
    found = list(answered(settings, requests, StandInAnswerer))
    asked = (folder / "asked").read_text().split()
    return {
        "batch": sorted((line, json.loads(answer)["custom_id"]) for line, answer in found),
        "batch_asked": len(asked),
        "batch_distinct": len(set(asked)),
    }


def serve_and_kill(folder: Path) -> Json:
    """Two replicas behind our ingress, and behind Ray's, which are killed while they answer."""
    import httpx
    import psutil
    from ray import serve
    from stand_ins import SECONDS

    from clover_vllm.cluster.serving import build

    def app(**more: Any) -> Any:
        model = {
            "model_loading_config": {"model_id": "small", "model_source": "none"},
            "accelerator_config": {"kind": "cpu"},
            "placement_group_config": {"bundle_per_worker": {"CPU": 1}},
            "server_cls": "stand_ins:StandInServer",
            "engine_kwargs": {"max_num_seqs": 32},
            "runtime_env": {"env_vars": {"STAND_IN_FOLDER": str(folder)}},
            "deployment_config": {"num_replicas": 2},
        }
        ingress = {"num_replicas": 1}
        return build({"llm_configs": [model], "ingress_deployment_config": ingress, **more})

    def replicas() -> dict[int, Json]:
        """Those that live, by process id."""
        made = {int(p.stem): json.loads(p.read_text()) for p in folder.glob("*.json")}
        return {pid: note for pid, note in made.items() if is_alive(pid)}

    def is_alive(pid: int) -> bool:
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    def ask(number: int, stream: bool = False) -> tuple[int, str]:
        body = {"model": "small", "messages": [{"role": "user", "content": f"q{number}"}], "stream": stream}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        if stream or answer.status_code != 200:
            return answer.status_code, answer.text
        return 200, str(answer.json()["choices"][0]["message"]["content"])

    def while_asked(harm: Callable[[], None], stream: bool = False) -> list[tuple[int, str]]:
        with ThreadPoolExecutor(16) as pool:
            asked = [pool.submit(ask, i, stream) for i in range(16)]
            time.sleep(0.6 * SECONDS)
            harm()
            return [future.result() for future in asked]

    def wait_for(count: int) -> None:
        until = time.monotonic() + 60
        while len(replicas()) < count and time.monotonic() < until:
            time.sleep(0.2)

    gone: list[int] = []

    def kill() -> None:
        pid, note = next(iter(replicas().items()))
        gone.append(note["child"])
        psutil.Process(pid).kill()

    def tell_engine_to_die() -> None:
        pid, note = next(iter(replicas().items()))
        gone.append(note["child"])
        (folder / f"die-{pid}").touch()

    url = f"http://127.0.0.1:{free_port()}"
    serve.start(http_options={"port": int(url.rpartition(":")[2])})
    serve.run(app(), route_prefix="/")
    found: Json = {"cores": sorted(note["cores"] for note in replicas().values())}
    found["whole_stream"] = ask(0, stream=True)
    found["replica_killed"] = while_asked(kill)
    wait_for(2)
    found["engine_died"] = while_asked(tell_engine_to_die)
    wait_for(2)
    found["streams"] = while_asked(kill, stream=True)
    until = time.monotonic() + 20
    while any(map(is_alive, gone)) and time.monotonic() < until:
        time.sleep(0.2)
    found["orphans"] = [pid for pid in gone if is_alive(pid)]
    wait_for(2)
    serve.run(app(ingress_cls_config={}), route_prefix="/")
    found["with_rays_ingress"] = while_asked(kill)
    return found


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
