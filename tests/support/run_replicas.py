"""Runs requests through data-parallel engines; `engines.run_script` starts it.

`main` takes {"engine": arguments of vLLM's AsyncEngineArgs, "requests": [{"prompt", "params"}]} and returns tokens by
request, and sums of the front end's metrics by name and engine.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from typing import Any

Json = dict[str, Any]


def main(spec: Json) -> Json:
    fork_engines()
    from prometheus_client import REGISTRY
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**spec["engine"]))
    try:
        tokens = asyncio.run(answers(engine, spec["requests"]))
        sums: dict[str, dict[str, float]] = {}
        for family in REGISTRY.collect():
            for sample in family.samples:
                if sample.name.startswith(("clover:", "vllm:spec_decode")):
                    own = sums.setdefault(sample.name, {})
                    replica = sample.labels.get("engine", "")
                    own[replica] = own.get(replica, 0.0) + sample.value
        return {"tokens": tokens, "metrics": sums}
    finally:
        engine.shutdown()


def fork_engines() -> None:
    """Let vLLM fork its processes. It spawns them, which import torch anew; this one has computed nothing so far."""
    from vllm.v1.engine import coordinator, utils
    from vllm.v1.executor import multiproc_executor

    for module in (coordinator, utils, multiproc_executor):
        module.get_mp_context = lambda: multiprocessing.get_context("fork")


async def answers(engine: Any, requests: list[Json]) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    async def one(number: int, request: Json) -> list[int]:
        params = SamplingParams(**request["params"], output_kind=RequestOutputKind.FINAL_ONLY)
        prompt = TokensPrompt(prompt_token_ids=request["prompt"])
        found: list[int] = []
        async for output in engine.generate(prompt, params, str(number)):
            found = list(output.outputs[0].token_ids)
        return found

    return list(await asyncio.gather(*(one(i, request) for i, request in enumerate(requests))))
