"""A Ray cluster of this machine, with stand-ins for engines; `engines.Script` starts it.

`main` takes {"folder": for notes, "what": "batch", "data", "train", "kill", "scale" or "roll"} and returns what a test looks at.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

Json = dict[str, Any]

FATAL = {30: "kill", 70: "fatal"}
"""Lines of a batch that end who is asked them first."""


def main(spec: Json) -> Json:
    what = {
        "batch": batch,
        "data": data,
        "train": train,
        "kill": serve_and_kill,
        "scale": serve_and_scale,
        "roll": serve_and_roll,
    }
    return what[spec["what"]](Path(spec["folder"]))


def start_ray() -> None:
    """Whatever the environment says, Ray's processes inherit."""
    set_environment()
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)


def set_environment() -> None:
    """For a cluster of a test: a token of its own, and not one in the user's home."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def batch(folder: Path) -> Json:
    """100 lines through two actors; one ends the engine that is asked it first, another kills the actor."""
    start_ray()
    from batch_stand_ins import StandInAnswerer

    from clover_vllm.cluster.batch import Request
    from clover_vllm.cluster.settings import BatchSettings
    from clover_vllm.cluster.through_ray import answered

    requests = [
        Request(i, name, json.dumps({"custom_id": name}))
        for i in range(1, 101)
        for name in [f"{FATAL.get(i, 'r')}{i}"]
    ]
    settings = BatchSettings(folder, folder, ("--model", str(folder)), at_once=32, ray=True, replicas=2)
    found = list(answered(settings, requests, StandInAnswerer))
    asked = (folder / "asked").read_text().split()
    children = [int(path.stem) for path in folder.glob("*.child")]
    return {
        "batch": sorted((line, json.loads(answer)["custom_id"]) for line, answer in found),
        "batch_asked": len(asked),
        "batch_distinct": len(set(asked)),
        "children": len(children),
        "orphans": left(children),
    }


def data(folder: Path) -> Json:
    """Answers, as `folder/settings.json` says, by two engines, one of which is killed behind the first shard."""
    start_ray()
    from clover_vllm.base.errors import UserError
    from clover_vllm.cluster.generation import generate_on_ray
    from clover_vllm.train.settings import DataSettings

    fields = json.loads((folder / "settings.json").read_text())
    prompts, output = [Path(path) for path in fields.pop("prompts")], folder / "run"
    settings = DataSettings(prompts=prompts, output=output, ray=True, replicas=2, **fields)
    killed: list[int] = []

    def kill() -> None:
        while not any(output.glob("answers-*")):
            time.sleep(0.01)
        # Ray cuts names of processes short.
        engines = [
            p for p in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(p.cmdline())
        ]
        killed.append(len(engines))
        engines[-1].kill()

    threading.Thread(target=kill, daemon=True).start()
    summary = generate_on_ray(settings)
    refused = []
    for changed in ({"replica_cpus": 64}, {"flags": ["--max-num-batched-tokens", "1"]}):
        try:
            generate_on_ray(replace(settings, output=folder / "refused", **changed))
        except UserError as error:
            refused.append(str(error))
    return {"summary": summary, "engines": killed, "refused": refused}


def train(folder: Path) -> Json:
    """A head, as `folder/settings.json` says, by two workers, one of which is killed behind the first checkpoint."""
    start_ray()
    from clover_vllm.base.errors import UserError
    from clover_vllm.cluster.training import train_on_ray
    from clover_vllm.train.settings import TrainSettings

    fields = json.loads((folder / "settings.json").read_text())
    data, output = [Path(path) for path in fields.pop("data")], folder / "run"
    settings = TrainSettings(data=data, output=output, ray_workers=2, **fields)
    killed: list[int] = []

    def kill() -> None:
        while not any(output.glob("checkpoint-*/complete")):
            time.sleep(0.01)
        workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in p.name()]
        killed.append(workers[-1].pid)
        workers[-1].kill()

    threading.Thread(target=kill, daemon=True).start()
    summary = train_on_ray(settings)
    try:
        train_on_ray(replace(settings, learning_rate=0.5))
        refused = ""
    except UserError as error:
        refused = str(error)
    return {"summary": summary, "killed": len(killed), "refused": refused}


class StandIns:
    """An application of stand-ins, whose replicas leave notes in a folder."""

    def __init__(self, folder: Path) -> None:
        from ray import serve

        self._folder = folder
        port = free_port()
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"
        serve.start(http_options={"port": port})

    def deploy(self, head: str = "old", ingresses: int = 1, **deployment: Any) -> None:
        """Start the application or change it, and wait until it is there."""
        from ray import serve

        from clover_vllm.cluster.serving import build

        model = {
            "model_loading_config": {"model_id": "small", "model_source": "none"},
            "accelerator_config": {"kind": "cpu"},
            "placement_group_config": {"bundle_per_worker": {"CPU": 1}},
            "server_cls": "stand_ins:StandInServer",
            "engine_kwargs": {"max_num_seqs": 64, "speculative_config": {"model": head}},
            "runtime_env": {"env_vars": {"STAND_IN_FOLDER": str(self._folder)}},
            "deployment_config": deployment,
        }
        serve.run(build({"llm_configs": [model], "ingress_deployment_config": {"num_replicas": ingresses}}))

    def replicas(self) -> dict[int, Json]:
        """Notes of those that live, by process id."""
        return {pid: note for pid, note in self._notes().items() if is_alive(pid)}

    def orphans(self) -> list[int]:
        """Process ids of what stood for engine cores of replicas that are gone."""
        return [note["child"] for pid, note in self._notes().items() if not is_alive(pid)]

    def _notes(self) -> dict[int, Json]:
        return {int(p.stem): json.loads(p.read_text()) for p in self._folder.glob("*.json")}

    def ask(self, number: int, stream: bool) -> tuple[int, str]:
        """Status and text."""
        import httpx

        answer = httpx.post(self._url, json=chat(number, stream), timeout=120)
        if stream or answer.status_code != 200:
            return answer.status_code, answer.text
        return 200, str(answer.json()["choices"][0]["message"]["content"])

    def keep_asking(self, clients: int, happens: Callable[[], object]) -> list[tuple[int, int, str]]:
        """Numbers, statuses and texts of requests that clients sent while something happened; odd ones were streams."""
        done = threading.Event()
        numbers = itertools.count()

        def client() -> list[tuple[int, int, str]]:
            found = []
            while not done.is_set():
                number = next(numbers)
                found.append((number, *self.ask(number, stream=number % 2 == 1)))
            return found

        with ThreadPoolExecutor(clients) as pool:
            asked = [pool.submit(client) for _ in range(clients)]
            try:
                happens()
            finally:
                done.set()
            return [answer for future in asked for answer in future.result()]


def serve_and_scale(folder: Path) -> Json:
    """A second replica comes with more clients than one is for, and leaves with them."""
    # Ray looks every ten seconds.
    os.environ["RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S"] = "0.5"
    start_ray()
    small = StandIns(folder)
    bounds = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 3}
    delays = {
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 1,
        "look_back_period_s": 2,
        "metrics_interval_s": 0.5,
    }
    small.deploy(autoscaling_config=bounds | delays)
    found: Json = {"whole_stream": small.ask(0, stream=True)[1], "replicas": [len(small.replicas())]}
    found["answers"] = []
    for clients, replicas in ((8, 2), (2, 1)):

        def change(to: int = replicas) -> None:
            wait(lambda: len(small.replicas()) == to)

        found["answers"] += small.keep_asking(clients, change)
        found["replicas"].append(len(small.replicas()))
    return found | {"orphans": left(small.orphans())}


def serve_and_roll(folder: Path) -> Json:
    """Two replicas of an application that gets another head meanwhile."""
    start_ray()
    small = StandIns(folder)
    small.deploy("old", ingresses=2, num_replicas=2)
    found: Json = {"whole_stream": small.ask(0, stream=True)[1]}
    found["heads"] = [note["head"] for note in small.replicas().values()]

    def roll() -> None:
        small.deploy("new", ingresses=2, num_replicas=2)
        wait(lambda: all(note["head"] == "new" for note in small.replicas().values()))

    found["answers"] = small.keep_asking(6, roll)
    found["heads"] += [note["head"] for note in small.replicas().values()]
    return found | {"orphans": left(small.orphans())}


def serve_and_kill(folder: Path) -> Json:
    """Two replicas, which are killed while they answer through our ingress, and through Ray's."""
    start_ray()
    import psutil
    from ray import serve
    from ray.serve.llm.ingress import OpenAiIngress
    from ray.serve.llm.openai_api_models import ChatCompletionRequest

    small = StandIns(folder)

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
            asked = [pool.submit(small.ask, i, False) for i in range(8)]
            streams = [pool.submit(small.ask, i, True) for i in range(8, 16)]
            rays = [pool.submit(ask_rays, i) for i in range(16, 24)]
            victim = wait_until_busy()
            gone.append(small.replicas()[victim]["child"])
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
            for pid in small.replicas():
                begun = folder / f"begun-{pid}"
                numbers = [int(line[1:]) for line in begun.read_text().split()] if begun.exists() else []
                if {number // 8 for number in numbers} == {0, 1, 2}:
                    return pid
            time.sleep(0.05)
        raise AssertionError("no replica was asked for all of it")

    small.deploy(num_replicas=2)
    found: Json = {
        "cores": sorted(note["cores"] for note in small.replicas().values()),
        "whole_stream": small.ask(0, stream=True)[1],
        "killed": while_asked(lambda pid: psutil.Process(pid).kill()),
    }
    wait(lambda: len(small.replicas()) == 2)
    found["died"] = while_asked(lambda pid: (folder / f"die-{pid}").touch())
    return found | {"orphans": left(gone), "victims": len(gone)}


def wait(until: Callable[[], bool], seconds: float = 100) -> None:
    """Until something is so, or some seconds."""
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def left(pids: Iterable[int], seconds: float = 20) -> list[int]:
    """Those that still live after some seconds."""
    wait(lambda: not any(map(is_alive, pids)), seconds)
    return [pid for pid in pids if is_alive(pid)]


def chat(number: int, stream: bool) -> Json:
    return {"model": "small", "messages": [{"role": "user", "content": f"q{number}"}], "stream": stream}


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
