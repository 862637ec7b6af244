"""One engine of the torture test, in a process of its own.

Reads one JSON object per line on stdin and answers with one on stdout. The first is {"llm": arguments of
vllm.LLM, "script": seed or null, "interpret": whether in Triton's interpreter}; then each {"requests": [...], "known": answers by request, by sequence} is a wave,
with "noise": seed if its logits are to be moved at random by up to NOISE.
"""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clover_vllm.launch.in_process import runner_of
from clover_vllm.launch.interpreter import interpret
from clover_vllm.launch.process import Parent

NOISE = 5e-5
"""Plain vLLM's own float32 logits move by about as much with the rows that share a step."""


def serve(parent: Parent) -> None:
    """Answer commands until there are no more."""
    commands = parent.commands()
    settings = next(commands)
    if settings["interpret"]:
        interpret()  # before vLLM is imported
    import psutil
    from vllm import LLM

    from clover_vllm.check.scripted import drive

    llm = LLM(**settings["llm"])
    script, restless = (None, None) if settings["script"] is None else scripted(llm, settings["script"])
    parent.say({"ready": True})
    for command in commands:
        if script is not None:
            script.know(command["known"])
        with noise(runner_of(llm), command.get("noise")):
            result = drive(llm, command["requests"])
        release_free_memory()
        result["stats"]["rss"] = psutil.Process().memory_info().rss
        result["stats"].update(drafted(runner_of(llm)), slept=restless.slept if restless else 0)
        parent.say(result)


def drafted(runner: Any) -> dict[str, Any]:
    """What a runner has verified and accepted so far; nothing without Clover-2."""
    from clover_vllm.tree.kinds import SOURCES

    counters = getattr(runner, "counters", None)
    if counters is None:
        return {"drafts": 0.0, "accepted": 0.0, "verified": {}, "kept": {}}
    by_source = bool(counters.nodes_of.sum())
    return {
        "drafts": counters.total("drafts"),
        "accepted": float(counters.accepted.sum()),
        "verified": dict(zip(SOURCES, counters.nodes_of.tolist(), strict=True)) if by_source else {},
        "kept": dict(zip(SOURCES, counters.accepted_of.tolist(), strict=True)) if by_source else {},
    }


def scripted(llm: Any, seed: int) -> tuple[Any, Any]:
    """Trees of which half are the head's own and half hide the right answer, whatever the head is worth.

    Adaptive ones change their sizes at random, and on the V1 runner sleep and wake; who sees to that there is the
    second thing returned.
    """
    from clover_vllm.check.restless import Restless
    from clover_vllm.check.scripted import ScriptedSlots, ScriptedTrees

    runner = runner_of(llm)
    if hasattr(runner, "speculator"):  # V2
        sizes = getattr(llm.llm_engine.engine_core.engine_core.scheduler, "sizes", None)
        if sizes is not None:
            rng = random.Random(seed)
            sizes.choose = lambda _: rng.choice(sizes.ladder)
        return ScriptedSlots(runner, seed, share=0.5), None
    restless = Restless(runner, seed) if runner.speculation.sizer is not None else None
    return ScriptedTrees(runner, seed, share=0.5), restless


def release_free_memory() -> None:
    """Give back to the system what glibc's malloc keeps for reuse, so that growth of the rest shows.

    What it keeps grows for hours, in plain vLLM as well, while what is in use does not.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # it is glibc
        trim(0)


@contextmanager
def noise(runner: Any, seed: int | None) -> Iterator[None]:
    """Move a runner's logits at random by up to NOISE; None: do not."""
    import torch

    if seed is None:
        yield
        return
    generator = torch.Generator().manual_seed(seed)
    original = runner.model.compute_logits

    def moved(*args: Any, **kwargs: Any) -> Any:
        logits = original(*args, **kwargs)
        return logits + NOISE * (2 * torch.rand(logits.shape, generator=generator) - 1)

    runner.model.compute_logits = moved
    try:
        yield
    finally:
        del runner.model.compute_logits  # the instance's; the class's stays


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    serve(Parent())
