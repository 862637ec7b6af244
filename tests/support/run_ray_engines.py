"""Ray Serve with real engines, which are killed while they answer; `engines.Script` starts it.

`main` takes {"target", "head": folders, "requests": lines of OpenAI's batch files, "kills": how many, "seed"} and returns
statuses and texts by request, what was killed, what is left of it, and metrics of a quiet time before.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Json = dict[str, Any]

VICTIMS = ("VLLM::EngineCore", "VLLM::Worker", "ray::ServeReplica:default:CloverServer")


def main(spec: Json) -> Json:
    from run_ray import free_port, set_environment

    set_environment()
    import httpx
    import psutil
    import ray
    from ray import serve

    from clover_vllm.cluster.serving import build

    ports = free_port(), free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _metrics_export_port=ports[1])
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8}
    engine |= {
        "num_gpu_blocks_override": 256,
        "block_size": 32,
        "speculative_config": {"model": spec["head"]},
    }
    model = {
        "model_loading_config": {"model_id": "small", "model_source": spec["target"]},
        "accelerator_config": {"kind": "cpu"},
        "placement_group_config": {"bundle_per_worker": {"CPU": 1}},
        "engine_kwargs": engine,
        "deployment_config": {"num_replicas": 2},
    }
    serve.start(http_options={"port": ports[0]})
    serve.run(build({"llm_configs": [model], "ingress_deployment_config": {"num_replicas": 1}}))
    requests = [line["body"] for line in spec["requests"]]

    def ask(body: Json) -> tuple[int, str]:
        answer = httpx.post(f"http://127.0.0.1:{ports[0]}/v1/chat/completions", json=body, timeout=300)
        found = (
            answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
        )
        return answer.status_code, str(found)

    def named(*names: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                title = " ".join(process.cmdline())
                if title.startswith(names) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def metrics() -> dict[str, float]:
        sums: dict[str, float] = {}
        for line in httpx.get(f"http://127.0.0.1:{ports[1]}/metrics").text.splitlines():
            if line.startswith(("ray_clover_", "ray_vllm_spec_decode")):
                key, value = line.rsplit(" ", 1)
                name = key.partition("{")[0]
                sums[name] = sums.get(name, 0.0) + float(value)
        return sums

    rng = random.Random(spec["seed"])
    killed: list[str] = []
    victims: list[psutil.Process] = []
    answered = threading.Semaphore(0)
    done = threading.Event()

    def harm() -> None:
        for i in range(spec["kills"]):
            while len(named("VLLM::Worker")) < 2 and not done.is_set():
                time.sleep(0.5)
            for _ in range(rng.randrange(2, 20)):
                answered.acquire()
            if done.is_set():
                return
            what = VICTIMS[i % len(VICTIMS)]
            victim = rng.choice(named(what))
            victims.extend([victim, *victim.children(recursive=True)])
            victim.kill()
            killed.append(what)

    def ask_and_count(body: Json) -> tuple[int, str]:
        try:
            return ask(body)
        finally:
            answered.release()

    with ThreadPoolExecutor(8) as pool:
        quiet = list(pool.map(ask, requests[:12]))
        time.sleep(20)  # both are pushed, and scraped, every few seconds
        counted = metrics()
        killer = threading.Thread(target=harm)
        killer.start()
        noisy: list[tuple[int, str]] = []
        while killer.is_alive() or len(noisy) < 200:
            noisy += pool.map(ask_and_count, requests)
    done.set()
    answered.release(100)
    killer.join()
    until = time.monotonic() + 20
    while any(map(is_alive, victims)) and time.monotonic() < until:
        time.sleep(0.2)
    return {
        "quiet": quiet,
        "noisy": noisy,
        "killed": killed,
        "orphans": [process.pid for process in victims if is_alive(process)],
        "metrics": counted,
    }


def is_alive(process: Any) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
