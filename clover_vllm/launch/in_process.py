"""A vllm.LLM whose engine core lives in this process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`): asked and stepped one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def add_request(
    llm: Any,
    name: str,
    prompt: Sequence[int],
    params: Mapping[str, Any],
    whole: bool = True,
    priority: int = 0,
) -> None:
    """Ask for an answer.

    Args:
        llm: a vllm.LLM.
        name: of the request.
        prompt: token ids.
        params: arguments of vllm.SamplingParams.
        whole: whether the answer comes once it is finished, or step by step what is new.
        priority: as vLLM has it.
    """
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.FINAL_ONLY if whole else RequestOutputKind.DELTA
    asked = SamplingParams(**params, output_kind=kind)
    llm.llm_engine.add_request(name, tokens_input(list(prompt)), asked, priority=priority)


def until_idle(llm: Any) -> Iterator[Any]:
    """Step until all requests have ended; yields vLLM's outputs as they come."""
    while llm.llm_engine.has_unfinished_requests():
        yield from llm.llm_engine.step()


def core_of(llm: Any) -> Any:
    """The engine core."""
    return llm.llm_engine.engine_core.engine_core


def runner_of(llm: Any) -> Any:
    """The model runner of its only worker."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner
