"""Continuations found in a request's own text, and in earlier answers: Arctic Inference's suffix cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from clover_vllm.tree.forest import Retrieved

logger = init_logger("vllm.clover")

DEPTH = 24
"""Longest match and longest continuation, in tokens, as vLLM's method `suffix` has it."""

ANSWERS = 512
"""Earlier answers that are kept; the oldest goes first. Each token of one takes about 330 bytes."""

LEAST_SHARE = 0.1
"""A continuation that followed more rarely than this is not proposed."""

LEAST_MATCH = 2
"""Tokens that must be the same for a continuation to count."""


def suffix_cache(retrieval: str) -> Any:
    """A cache for the option `retrieval`, or None where there is none."""
    if retrieval == "off":
        return None
    try:
        from arctic_inference.suffix_decoding import SuffixDecodingCache
    except ImportError:
        logger.info(
            "Clover-2 drafts from the head alone; `pip install arctic-inference` adds retrieved drafts."
        )
        return None
    return SuffixDecodingCache(DEPTH, 0 if retrieval == "own" else ANSWERS)


class Retrieval:
    """The texts of running requests, and answers of earlier ones, by suffix."""

    def __init__(self, cache: Any) -> None:
        """cache: from `suffix_cache`."""
        self._cache = cache
        self._known: dict[str, int] = {}  # by request, output tokens that the cache has

    def forget(self, names: Sequence[str]) -> None:
        """Requests have ended; their answers stay."""
        for name in names:
            if self._known.pop(name, None) is not None:
                self._cache.stop_request(name)

    def look_up(self, name: str, state: CachedRequestState, most: int) -> Retrieved | None:
        """What may come next in a request's text.

        Args:
            name: of the request.
            state: of vLLM's runner.
            most: nodes.
        """
        output = state.output_token_ids
        known = self._known.get(name)
        if known is None:
            if state.prompt_token_ids is None:
                return None
            self._cache.start_request(name, state.prompt_token_ids)
            known = 0
        if len(output) > known:
            self._cache.add_active_response(name, output[known:])
        self._known[name] = len(output)
        if most < 1:
            return None
        tail = output[-DEPTH:]
        if len(tail) < DEPTH and state.prompt_token_ids is not None:
            tail = state.prompt_token_ids[len(tail) - DEPTH :] + tail
        found = self._cache.speculate(
            name,
            tail,
            max_spec_tokens=most,
            max_spec_factor=2.0,
            min_token_prob=LEAST_SHARE,
            use_tree_spec=True,
        )
        if not found.token_ids or found.match_len < LEAST_MATCH:
            return None
        return Retrieved(found.token_ids, found.parents, found.probs, found.match_len)
