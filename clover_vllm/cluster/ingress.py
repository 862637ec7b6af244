"""Takes requests in: `ray.serve.llm`'s ingress, which sends a request again while no byte of its answer has gone out.

Ray itself fails a request whose replica dies. An answer that has not begun can be had from another replica; greedy and
seeded requests get the same text there. A stream that has begun ends with an error event.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.llm.ingress import OpenAiIngress

logger = logging.getLogger("ray.serve")

ATTEMPTS = 6
PAUSE = 0.1
"""Seconds before the second attempt; doubled for each further one."""


class ReplicaFailed(Exception):
    """A replica gave an error of its own instead of an answer."""


class RetryingIngress(OpenAiIngress):
    """`OpenAiIngress` that survives its replicas."""

    async def _get_response(
        self, *, body: Any, call_method: str, raw_request: Any = None
    ) -> AsyncIterator[Any]:
        for attempt in range(1, ATTEMPTS + 1):
            begun = False
            try:
                answer = super()._get_response(
                    body=copy.deepcopy(body), call_method=call_method, raw_request=raw_request
                )
                async for chunk in answer:
                    if not begun and attempt < ATTEMPTS and is_servers_error(chunk):
                        raise ReplicaFailed
                    begun = True
                    yield chunk
                return
            except Exception as error:
                if not is_lost(error) or (attempt == ATTEMPTS and not begun):
                    raise
                if begun:
                    logger.warning("A replica was lost in the middle of an answer.")
                    yield [LOST]
                    return
                logger.warning("A replica was lost before it answered; attempt %d follows.", attempt + 1)
            await asyncio.sleep(PAUSE * 2 ** (attempt - 1))


LOST = "data: " + json.dumps(
    {
        "error": {
            "message": "The server lost this answer; send the request again.",
            "type": "InternalServerError",
            "code": 503,
        }
    }
)
LOST += "\n\n"
"""The event with which a stream ends that has begun."""


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a replica or its engine is gone, and not that the request is bad."""
    if isinstance(error, RayActorError | DeploymentUnavailableError | ReplicaFailed):
        return True
    return isinstance(error, RayTaskError) and "EngineDeadError" in str(error)


def is_servers_error(chunk: Any) -> bool:
    """Whether the first piece of an answer is an error of status 500 or above."""
    first = chunk[0] if isinstance(chunk, list) and chunk else chunk
    if isinstance(first, str):  # an event of a stream
        text = first.removeprefix("data: ").strip()
        if not text.startswith('{"error"'):
            return False
        code = json.loads(text)["error"].get("code")
    else:
        code = getattr(getattr(first, "error", None), "code", None)
    return isinstance(code, int) and code >= 500
