"""Runs streaming sessions (vLLM's `StreamingInput`) in a process of its own; `engines.run_script` starts it.

`main` takes {"engine": arguments of AsyncEngineArgs, "sessions": [{"turns": [token ids], "params": {}}]} and
returns per session its turns, each {"tokens", "finish"}. A turn is sent when the one before it has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

Json = dict[str, Any]


async def session(engine: Any, name: str, asked: Json) -> list[Json]:
    from vllm import SamplingParams
    from vllm.engine.protocol import StreamingInput
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind

    wanted = asked["params"].get("repetition_detection")
    repetition = RepetitionDetectionParams(**wanted) if wanted else None
    params = SamplingParams(
        **{**asked["params"], "repetition_detection": repetition}, output_kind=RequestOutputKind.DELTA
    )
    ended = asyncio.Event()
    turns: list[Json] = [{"tokens": [], "finish": None}]

    async def inputs() -> AsyncGenerator[Any, None]:
        for prompt in asked["turns"]:
            yield StreamingInput(TokensPrompt(prompt_token_ids=prompt), params)
            await ended.wait()
            ended.clear()

    async for output in engine.generate(inputs(), params, request_id=name):
        turns[-1]["tokens"] += output.outputs[0].token_ids
        if output.outputs[0].finish_reason is not None:
            turns[-1]["finish"] = output.outputs[0].finish_reason
            turns.append({"tokens": [], "finish": None})
            ended.set()
    return turns[:-1]


async def sessions(spec: Json) -> list[list[Json]]:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**spec["engine"]))
    try:
        asked = enumerate(spec["sessions"])
        return await asyncio.wait_for(asyncio.gather(*(session(engine, f"s{i}", s) for i, s in asked)), 300)
    finally:
        engine.shutdown()


def main(spec: Json) -> list[list[Json]]:
    return asyncio.run(sessions(spec))
