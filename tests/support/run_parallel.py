"""Runs requests through an engine of several ranks; `engines.run_script` starts it.

The engine core lives in this process and its workers in processes of their own, through vLLM's own executor. Keys of
what `main` takes:

    llm: arguments of vllm.LLM, `tensor_parallel_size` among them.
    requests: see `clover_vllm.check.scripted.drive`.
    scripted: {"answers", "seed", "share"}: as in `run_engine`, on every rank.
    restless: seed: adaptive drafting sleeps, wakes and sizes trees at random; the first rank decides.

It returns what `drive` returns, with "ranks": per rank a digest of the trees that it verified and its counters; and with
"metrics": Clover's sums as the front end exports them.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

Json = dict[str, Any]


def main(spec: Json) -> Json:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to run functions of this file in the workers
    from prometheus_client import REGISTRY
    from run_replicas import fork_engines
    from vllm import LLM

    from clover_vllm.check.scripted import drive
    from clover_vllm.engine.drafting import measure

    fork_engines()
    measure.SECONDS = 0.2  # ranks that share a core wait for each other's turn
    llm = LLM(**{"disable_log_stats": True, **spec["llm"]})
    with_clover = "speculative_config" in spec["llm"]
    if with_clover:
        llm.collective_rpc(watch, args=(spec.get("scripted"), spec.get("restless")))
    result = drive(llm, [{"prompt": [], **request} for request in spec["requests"]])
    result["ranks"] = llm.collective_rpc(report) if with_clover else []
    sums: dict[str, float] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith("clover:"):
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    result["metrics"] = sums
    return result


def watch(worker: Any, scripted: Json | None, restless: int | None) -> None:
    """In a worker: note every tree that is verified, and script drafts if asked to."""
    from clover_vllm.check.restless import Restless
    from clover_vllm.check.scripted import ScriptedTrees

    runner = worker.model_runner
    runner.seen, runner.grown = hashlib.sha256(), 0
    expand = runner.drafter.model.expand

    def counted(*args: Any) -> Any:
        runner.grown += 1
        return expand(*args)

    runner.drafter.model.expand = counted
    if scripted is not None:
        ScriptedTrees(runner, scripted["seed"], scripted["share"]).know(scripted["answers"])
    if restless is not None and runner.speculation.sizer is not None:
        Restless(runner, restless)
    original = runner._step

    def step(*args: Any) -> Any:
        made = original(*args)
        trees = [tree and (list(tree.tokens), list(tree.parents)) for tree in made.trees]
        runner.seen.update(repr(trees).encode())
        return made

    runner._step = step


def report(worker: Any) -> Json:
    """In a worker: what it has seen."""
    runner, counters = worker.model_runner, worker.model_runner.counters
    return {
        "trees": runner.seen.hexdigest(),
        "grown_by_the_head": runner.grown,
        "drafts": counters.total("drafts"),
        "nodes": counters.total("nodes"),
        "accepted": float(counters.accepted.sum()),
        "sizes": int((counters.sizes > 0).sum()),
        "decides": runner.speculation.sizer is not None,
        "exports": bool(counters._files),
    }
