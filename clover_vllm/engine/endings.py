"""Where a request ends, as the scheduler will see it (`vllm.v1.core.sched.utils.check_stop`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.utils import check_sequence_repetition
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from clover_vllm.tree.step import Ending


def ending_of(state: CachedRequestState, max_model_len: int) -> Ending:
    """Which token of the coming step is a request's last."""
    params, output = state.sampling_params, state.output_token_ids
    remaining = max_model_len - state.num_prompt_tokens
    if params is None:
        return Ending(remaining=remaining - len(output))
    if params.max_tokens is not None and params.max_tokens < remaining:
        remaining = params.max_tokens
    stops = _stops(params.eos_token_id, *(params.stop_token_ids or ()))
    return Ending(stops, remaining - len(output), repetition(params, output))


@lru_cache(maxsize=1024)
def _stops(*tokens: int | None) -> frozenset[int]:
    """The same set for all requests that end alike, and for all their steps."""
    return frozenset(token for token in tokens if token is not None)


def repetition(params: SamplingParams, output: list[int]) -> Callable[[Sequence[int]], bool] | None:
    """Tells from a step's tokens, which follow `output`, whether repetition detection ends the request."""
    wanted = params.repetition_detection
    if wanted is None:
        return None
    tail = output[-max(1, wanted.max_pattern_size * wanted.min_count) :]
    missing = params.min_tokens - len(output)

    def repeats(emitted: Sequence[int]) -> bool:
        return len(emitted) >= missing and check_sequence_repetition([*tail, *emitted], wanted)

    return repeats
