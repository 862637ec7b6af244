"""Where a request ends, as the scheduler will see it (`vllm.v1.core.sched.utils.check_stop`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.utils import check_sequence_repetition
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from clover_vllm.tree.step import Ending


def ending_of(state: CachedRequestState, max_model_len: int) -> Ending:
    """Which token of the coming step is a request's last."""
    remaining = max_model_len - state.num_tokens
    params = state.sampling_params
    if params is None:
        return Ending(remaining=remaining)
    if params.max_tokens is not None:
        remaining = min(remaining, params.max_tokens - len(state.output_token_ids))
    stops = frozenset(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        stops |= {params.eos_token_id}
    return Ending(stops, remaining, repetition(params, state.output_token_ids))


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
