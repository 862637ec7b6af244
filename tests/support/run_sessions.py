"""Runs streaming sessions (vLLM's `StreamingInput`) in a process of its own; `engines.run_script` starts it.

`main` takes {"engine": arguments of AsyncEngineArgs, "sessions": [{"turns": [token ids], "params": {}}], "watch":
whether to look at the steps of an engine with trees}. It returns {"sessions": per session its turns, each {"tokens",
"finish"}, "emitted": per session the numbers of tokens that its steps gave, if watched}. A turn is sent when the
one before it has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from run_replicas import fork_engines

Json = dict[str, Any]


class Watch:
    """Methods that vLLM adds to the worker: how many tokens the steps of each request give."""

    def watch_steps(self: Any) -> None:
        runner = self.model_runner
        self.emitted_by_step: dict[str, list[int]] = {}
        end_step = runner._end_step

        def end(step: Any) -> None:
            for r, (name, nodes) in enumerate(zip(runner.input_batch.req_ids, step.accepted, strict=True)):
                if r not in step.discarded:  # its prompt goes on
                    self.emitted_by_step.setdefault(name.partition("-")[0], []).append(len(nodes) + 1)
            end_step(step)

        runner._end_step = end

    def watched_steps(self: Any) -> dict[str, list[int]]:
        found: dict[str, list[int]] = self.emitted_by_step
        return found


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


async def sessions(spec: Json) -> Json:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    watch = spec.get("watch", False)
    more = {"worker_extension_cls": "run_sessions.Watch"} if watch else {}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**spec["engine"], **more))
    try:
        if watch:
            await engine.collective_rpc("watch_steps")
        asked = enumerate(spec["sessions"])
        runs = asyncio.gather(*(session(engine, f"s{i}", s) for i, s in asked))
        found: Json = {"sessions": await asyncio.wait_for(runs, 300)}
        if watch:
            (steps,) = await engine.collective_rpc("watched_steps")
            found["emitted"] = [steps[f"s{i}"] for i in range(len(spec["sessions"]))]
        return found
    finally:
        engine.shutdown()


def main(spec: Json) -> Json:
    fork_engines()
    return asyncio.run(sessions(spec))
