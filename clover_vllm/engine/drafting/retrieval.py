"""Continuations found in a request's own text, and in earlier answers: Arctic Inference's suffix cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from clover_vllm.tree import ROOT
from clover_vllm.tree.forest import Retrieved

logger = init_logger("vllm.clover")

DEPTH = 24
"""Longest match and longest continuation, in tokens, as vLLM's method `suffix` has it."""

ANSWERS = 512
"""Answers that are kept; the oldest goes first."""

TOKENS = 512 * ANSWERS
"""Tokens of those answers, and again of the texts of running requests, at most. Each takes about 330 bytes in the cache,
so that all of it stays below 2 x 262,144 x 330 bytes, 165 MiB, however long prompts and answers are."""

LONGEST_PAUSE = 4
"""After look-ups in vain a request's text is not looked up for 1 step, then 2, 4, ..., and at most this many."""

TRY = 8
"""One of this many requests is looked up from its first step on, whatever came of the others."""

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


@dataclass
class _Text:
    """What is known of a running request.

    Attributes:
        told: tokens of its answer that the cache has; None: not even its prompt.
        held: its tokens in the cache.
        pause: steps without a look-up after the last one in vain.
        wait: of those, steps that are left.
        found: tokens of which one should have come next, by the last look-up.
        at: tokens of the answer then.
    """

    told: int | None = None
    held: int = 0
    pause: int = 0
    wait: int = 0
    found: Collection[int] = ()
    at: int = 0


class Retrieval:
    """The texts of running requests, and answers of earlier ones, by suffix."""

    def __init__(self, cache: Any, longest_pause: int = LONGEST_PAUSE, tokens: int = TOKENS) -> None:
        """
        Args:
            cache: from `suffix_cache`.
            longest_pause: steps.
            tokens: of answers that are kept, and of running texts, at most.
        """
        self._cache, self.longest_pause, self._tokens = cache, longest_pause, tokens
        self._texts: dict[str, _Text] = {}
        self._answers: dict[str, int] = {}  # tokens of those that are kept, the oldest first
        self._kept = self._held = 0  # tokens of answers, and of running texts
        self._begun = 0
        self._usual = 0.0  # pause of the requests that ended lately

    def forget(self, names: Sequence[str]) -> None:
        """Requests have ended; their answers stay."""
        for name in names:
            text = self._texts.pop(name, None)
            if text is not None:
                self._usual += 0.2 * (text.pause - self._usual)
                self._held -= text.held
                if text.told is not None:
                    self._cache.stop_request(name)

    def look_up(self, name: str, state: CachedRequestState, most: int) -> Retrieved | None:
        """What may come next in a request's text; once per step, and often nothing is looked up.

        A text in which nothing was found, or the wrong thing, pauses for a while. A new one starts with the pause that is
        usual, before the cache is told its prompt, which takes milliseconds.

        Args:
            name: of the request.
            state: of vLLM's runner.
            most: nodes.
        """
        text = self._texts.get(name)
        if text is None:
            text = self._texts[name] = self._begin()
        output = state.output_token_ids
        if not self._is_due(text, output) or not self._tell(name, text, state) or most < 1:
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
            self._was_vain(text)
            return None
        text.found = [t for t, parent in zip(found.token_ids, found.parents, strict=True) if parent == ROOT]
        text.at = len(output)
        return Retrieved(found.token_ids, found.parents, found.probs, found.match_len)

    def _begin(self) -> _Text:
        self._begun += 1
        pause = round(self._usual) if self._begun % TRY else 0
        return _Text(pause=pause, wait=pause)

    def _is_due(self, text: _Text, output: Sequence[int]) -> bool:
        """Whether to look a text up in this step, after what came of the last time."""
        if text.found and text.at < len(output):
            if output[text.at] in text.found:
                text.pause = 0
            else:
                self._was_vain(text)
            text.found = ()
        text.wait -= 1
        return text.wait < 0

    def _was_vain(self, text: _Text) -> None:
        text.pause = min(max(1, 2 * text.pause), self.longest_pause)
        text.wait = text.pause

    def _tell(self, name: str, text: _Text, state: CachedRequestState) -> bool:
        """Tell the cache what it does not know of a text. False where there is no room or no text."""
        prompt, output = state.prompt_token_ids, state.output_token_ids
        if prompt is None:
            return False
        told = text.told or 0
        more = max(0, len(output) - told) + (len(prompt) if text.told is None else 0)
        if self._held + more > self._tokens:
            text.wait = self.longest_pause
            return False
        self._held += more
        text.held += more
        if text.told is None:
            self._kept -= self._answers.pop(name, 0)  # of an earlier request of this name
            self._cache.start_request(name, prompt)
        if len(output) > told:
            self._cache.add_active_response(name, output[told:])
        self._keep(name, len(output) - told)
        text.told = len(output)
        return True

    def _keep(self, name: str, more: int) -> None:
        """Count an answer that other requests may find, and let the oldest go."""
        if not self._cache.max_cached_requests:
            return
        cached = self._cache.cached_requests
        if name in cached:
            self._answers[name] = self._answers.get(name, 0) + max(0, more)
            self._kept += max(0, more)
        while len(self._answers) > len(cached) or self._kept > self._tokens:
            oldest = next(iter(self._answers))
            self._kept -= self._answers.pop(oldest)
            if oldest in cached:
                self._cache.evict_cached_response(oldest)
