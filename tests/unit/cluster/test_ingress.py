"""The ingress asks again while nothing of an answer has gone out, and never lets a lost stream look whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from ray.serve.exceptions import BackPressureError
from ray.serve.llm.openai_api_models import ChatCompletionRequest, ChatCompletionResponse, ErrorResponse
from starlette.responses import JSONResponse, StreamingResponse

from clover_vllm.cluster import ingress
from clover_vllm.cluster.ingress import LOST, RetryingIngress

Script = list[Any]
ANSWER = ChatCompletionResponse.model_validate(
    {
        "id": "a",
        "model": "small",
        "created": 1,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}}],
        "usage": {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1},
    }
)


def engine_died() -> BaseException:
    """As Ray brings a replica's exception to the caller."""
    return RayTaskError("chat", "EngineDeadError: EngineCore encountered an issue.", RuntimeError())


def servers_error(code: int) -> ErrorResponse:
    return ErrorResponse.model_validate({"error": {"message": "no", "type": "x", "code": code}})


class Replicas:
    """Stands for a deployment's handle: plays a script per request, and notes what it was asked."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.asked: list[Any] = []
        self.chat = self

    def options(self, **_: Any) -> Replicas:
        return self

    def remote(self, body: Any, info: Any) -> AsyncIterator[Any]:
        self.asked.append(body)
        return self._play(self.scripts.pop(0))

    async def _play(self, script: Script) -> AsyncIterator[Any]:
        for part in script:
            if isinstance(part, BaseException):
                raise part
            yield part


@pytest.fixture
def answer_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Replicas], str]:
    monkeypatch.setattr(ingress, "PAUSE", 0.0)

    def ask(replicas: Replicas, stream: bool = False) -> str:
        async def run() -> str:
            made = RetryingIngress(cast(Any, {"small": replicas}), cast(Any, {"small": None}))
            body = ChatCompletionRequest.model_validate(
                {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
            )
            response = await made._process_llm_request(body, "chat")
            if isinstance(response, JSONResponse):
                return str(json.loads(bytes(response.body))["choices"][0]["message"]["content"])
            assert isinstance(response, StreamingResponse)
            return "".join([str(part) async for part in response.body_iterator])

        return asyncio.run(run())

    return ask


EVENT = ['data: {"choices": []}\n\n']
LOSSES = [ActorDiedError(), engine_died(), servers_error(500), ['data: {"error": {"code": 500}}\n\n']]


@pytest.mark.parametrize("loss", LOSSES, ids=["replica", "engine", "error", "stream"])
def test_an_answer_that_has_not_begun_comes_from_another_replica(loss: Any, answer_of: Any) -> None:
    replicas = Replicas([loss], [loss], [ANSWER])
    assert answer_of(replicas) == "yes"
    assert len(replicas.asked) == 3
    assert len({id(body) for body in replicas.asked}) == 3  # a replica may change what it is given


@pytest.mark.parametrize("loss", LOSSES[:2], ids=["replica", "engine"])
def test_a_stream_that_has_begun_ends_with_an_error_event(loss: Any, answer_of: Any) -> None:
    replicas = Replicas([EVENT, loss], [EVENT])
    text = answer_of(replicas, stream=True)
    assert text == EVENT[0] + LOST + "data: [DONE]\n\n"
    assert len(replicas.asked) == 1
    assert json.loads(LOST.removeprefix("data: "))["error"]["code"] == 503


def test_a_whole_stream_is_passed_on(answer_of: Any) -> None:
    text = answer_of(Replicas([engine_died()], [EVENT, EVENT]), stream=True)
    assert text == EVENT[0] * 2 + "data: [DONE]\n\n"


@pytest.mark.parametrize("error", [ValueError("bad"), BackPressureError(5, 5)], ids=["bug", "full"])
def test_other_errors_are_not_tried_again(error: Exception, answer_of: Any) -> None:
    replicas = Replicas([error])
    with pytest.raises(type(error)):
        answer_of(replicas)
    assert len(replicas.asked) == 1


def test_a_bad_request_is_not_tried_again(answer_of: Any) -> None:
    replicas = Replicas([servers_error(400)])
    with pytest.raises(OpenAIHTTPException) as found:
        answer_of(replicas)
    assert found.value.status_code == 400
    assert len(replicas.asked) == 1


def test_attempts_end(answer_of: Any) -> None:
    replicas = Replicas(*([ActorDiedError()] for _ in range(ingress.ATTEMPTS)))
    with pytest.raises(ActorDiedError):
        answer_of(replicas)
    assert not replicas.scripts
