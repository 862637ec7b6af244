"""vLLM's scheduler with trees of a size that is chosen for every step.

Its own dynamic speculative decoding reads the number of drafts from a table by number of requests
(`Scheduler.dynamic_sd_lookup`), tells the runner, and schedules as many placeholders in the step after. The table here
asks `clover_vllm.tree.sizes`, which learns from the steps that come back.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput

from clover_vllm.engine.config import SCHEDULER
from clover_vllm.tree.sizes import Sizes, ladder_to


def make_scheduler(vllm_config: VllmConfig, **given: Any) -> Scheduler:
    """What `SchedulerConfig.scheduler_cls` names; with trees of one size, vLLM's own."""
    if is_sized(vllm_config):
        return SizedScheduler(vllm_config=vllm_config, **given)
    own = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return own(vllm_config=vllm_config, **given)


def is_sized(vllm_config: VllmConfig) -> bool:
    """Whether trees are sized step by step. Data-parallel ranks would choose apart from each other."""
    options = getattr(vllm_config.speculative_config, "clover", None)
    return (
        options is not None
        and options.tree == "adaptive"
        and vllm_config.scheduler_config.scheduler_cls == SCHEDULER
        and vllm_config.scheduler_config.async_scheduling
        and vllm_config.parallel_config.data_parallel_size == 1
    )


class SizedScheduler(AsyncScheduler):
    """Times steps and counts what they accept."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes = Sizes(ladder_to(self.num_spec_tokens))
        self.dynamic_sd_lookup = SizeTable(self.sizes)
        self._scheduled: dict[int, float] = {}  # seconds at which steps under way were scheduled, by id
        self._ended = 0.0  # seconds at which the last step came back

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        self._scheduled[id(output)] = time.perf_counter()
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        now = time.perf_counter()
        begun = max(self._scheduled.pop(id(scheduler_output), now), self._ended)
        self._ended = now
        self._learn(scheduler_output, model_runner_output, 1e3 * (now - begun))
        return super().update_from_output(scheduler_output, model_runner_output)

    def _learn(self, step: SchedulerOutput, made: ModelRunnerOutput, milliseconds: float) -> None:
        """From a step without prompts what it took; from any what was accepted."""
        if not made.sampled_token_ids:
            return
        drafts, rows = step.scheduled_spec_decode_tokens, step.num_scheduled_tokens
        verified: Counter[int] = Counter()
        accepted: Counter[int] = Counter()
        for name, tokens in drafts.items():
            emitted = len(made.sampled_token_ids[made.req_id_to_index[name]])
            if emitted:
                verified[len(tokens)] += 1
                accepted[len(tokens)] += emitted - 1
        for size, requests in verified.items():
            self.sizes.saw_drafts(requests, size, accepted[size])
        sizes = {len(drafts.get(name, ())) for name in rows}
        if len(sizes) == 1:
            [size] = sizes
            if step.total_num_scheduled_tokens == len(rows) * (1 + size) and not step.scheduled_new_reqs:
                self.sizes.saw_step(len(rows), size, milliseconds)


class SizeTable(list[int]):
    """`Scheduler.dynamic_sd_lookup`: asked once for each step, by its number of requests."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self._sizes = sizes

    def __getitem__(self, requests: Any) -> Any:
        return self._sizes.choose(requests)
