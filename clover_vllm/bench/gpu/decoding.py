"""An engine of a method in this process, and requests that all decode at once."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

from clover_vllm.bench.gpu.forced import Forced
from clover_vllm.bench.gpu.shapes import METHODS, ForcedMethod
from clover_vllm.launch.in_process import add_request, core_of, runner_of, until_idle

Json = dict[str, Any]

MOST_TOKENS = 8192
"""Rows of a step, at most."""


def method_of(name: str) -> ForcedMethod:
    """The method of this name."""
    return next(method for method in METHODS if str(method) == name)


def engine_arguments(spec: Json) -> Json:
    """Arguments of vllm.LLM.

    Args:
        spec: "method", "target", "head", "dtype", "counts" of requests that decode together, "longest" in tokens,
            "compiled" (vLLM's own compilation), "interpret".
    """
    method = method_of(spec["method"])
    rows = method.nodes + 1
    most = MOST_TOKENS if not spec["interpret"] else 256
    arguments: Json = {
        "model": spec["target"],
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": spec["dtype"],
        "max_model_len": spec["longest"],
        "max_num_seqs": max(spec["counts"]),
        "max_num_batched_tokens": most,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if method.nodes:
        arguments["speculative_config"] = {
            "method": "clover2",
            "model": spec["head"],
            "num_speculative_tokens": method.nodes,
            "tree": "chain" if method.is_chain else "best_first",
            "draft_rounds": method.rounds,
            "draft_min_joint": 0.0,
        }
    if spec["interpret"]:
        return arguments | {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 24}
    sizes = [rows * count for count in spec["counts"] if rows * count <= most]
    arguments["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    if not spec["compiled"]:
        arguments["compilation_config"] |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return arguments | {"attention_backend": spec["attention"], "gpu_memory_utilization": 0.9}


class Decoding:
    """Requests of one engine.

    Attributes:
        runner: the engine's.
        on_gpu: whether it computes on one.
    """

    def __init__(self, spec: Json) -> None:
        """Start the engine; `spec` is that of `engine_arguments`."""
        import torch
        from vllm import LLM

        self._llm = LLM(**engine_arguments(spec))
        self._scheduler = core_of(self._llm).scheduler
        self.runner = runner_of(self._llm)
        self.on_gpu = torch.cuda.is_available()
        method = method_of(spec["method"])
        if method.nodes:
            Forced(self.runner, method)
        self._calls = 0
        self._sample_tokens, self.runner.sample_tokens = self.runner.sample_tokens, self._counted
        self._names = itertools.count()
        self._rng = random.Random(0)
        self._vocab = self.runner.vocab_size

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        return self._sample_tokens(*args, **kwargs)

    @property
    def engine(self) -> Any:
        return self._llm.llm_engine

    def add(self, count: int, context: int, tokens: int) -> list[str]:
        """Requests with prompts of their own.

        Args:
            count: of requests.
            context: tokens of each prompt.
            tokens: of each answer.

        Returns:
            their names.
        """
        params = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False}
        names = [str(next(self._names)) for _ in range(count)]
        for name in names:
            prompt = [self._rng.randrange(self._vocab - 1) for _ in range(context)]
            add_request(self._llm, name, prompt, params)
        return names

    def until_all_decode(self) -> None:
        """Step until no prompt is left to be computed."""
        while True:
            running = self._scheduler.running
            if not self._scheduler.waiting and all(
                request.num_computed_tokens >= request.num_prompt_tokens for request in running
            ):
                break
            self.engine.step()
        self.steps(4)

    def steps(self, count: int) -> tuple[float, float]:
        """Run decode steps.

        Returns:
            seconds per step, and tokens that a request emitted per step.
        """
        self._wait()
        emitted, begun, started = self._emitted(), self._calls, time.perf_counter()
        while self._calls < begun + count:
            self.engine.step()
        self._wait()
        seconds = time.perf_counter() - started
        requests = max(1, len(self._scheduler.running))
        return seconds / count, (self._emitted() - emitted) / count / requests

    def finish(self, tokens: int) -> float:
        """Run until all requests have ended.

        Returns:
            tokens per second, of `tokens` in all.
        """
        started = time.perf_counter()
        for _ in until_idle(self._llm):
            pass
        return tokens / (time.perf_counter() - started)

    def keep(self, names: list[str], count: int) -> list[str]:
        """Abort all but the first `count` requests; returns the names that are left."""
        if names[count:]:
            self.engine.abort_request(names[count:])
        if not count:
            for _ in until_idle(self._llm):
                pass
        else:
            self.steps(3)
        return names[:count]

    def context(self) -> float:
        """Tokens of a running request, on average."""
        running = self._scheduler.running
        return sum(request.num_tokens for request in running) / max(1, len(running))

    def _emitted(self) -> int:
        return sum(request.num_output_tokens for request in self._scheduler.running)

    def _wait(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
