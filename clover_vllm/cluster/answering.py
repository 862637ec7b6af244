"""An engine that answers lines of OpenAI's batch files, with the code of `vllm run-batch`."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from clover_vllm.base.errors import UserError
from clover_vllm.launch.environment import prepare
from clover_vllm.launch.reaper import reaped

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

    from clover_vllm.cluster.batch import Request
    from clover_vllm.cluster.settings import BatchSettings


class EngineDied(Exception):
    """The engine can answer nothing any more."""


class Answering:
    """Answers lines through an engine."""

    def __init__(self, engine: EngineClient, endpoints: dict[str, Any]) -> None:
        """
        Args:
            engine: vLLM's.
            endpoints: of vLLM's `build_endpoint_registry`.
        """
        self._engine = engine
        self._endpoints = endpoints

    async def answer(self, text: str) -> str:
        """A line of the output for a line of the input.

        Raises:
            EngineDied: the engine has died.
        """
        from vllm.entrypoints.launchers import run_batch

        request = run_batch.BatchRequestInput.model_validate_json(text)
        endpoint = self._endpoints.get(request.url.split("/")[-1])
        found = None
        if endpoint is not None:
            found = run_batch.handle_endpoint_request(request, run_batch.BatchProgressTracker(), **endpoint)
        if found is None:
            message = f"vllm run-batch has no endpoint {request.url}"
            found = run_batch.make_async_error_request_output(request, message)
        output = await found
        if output.error is not None and self._engine.errored:
            raise EngineDied  # no answer of this request's
        return str(output.model_dump_json())


@asynccontextmanager
async def answering(flags: Sequence[str]) -> AsyncIterator[Answering]:
    """Start an engine with flags of `vllm run-batch`, and stop it.

    Raises:
        UserError: it does not start.
    """
    from vllm.entrypoints.launchers import run_batch
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

    arguments = parse_flags(flags)
    client = build_async_engine_client(arguments)
    try:
        engine = await client.__aenter__()
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"vLLM does not start ({reason}).") from error
    try:
        yield Answering(engine, await run_batch.build_endpoint_registry(engine, arguments))
    finally:
        await client.__aexit__(None, None, None)


def parse_flags(flags: Sequence[str]) -> Namespace:
    """Arguments of `vllm run-batch`; ends the command as argparse does where they are wrong.

    Raises:
        UserError: a reasoning parser that vLLM does not know.
    """
    from vllm.entrypoints.launchers import run_batch
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = run_batch.make_arg_parser(FlexibleArgumentParser(prog="clover-vllm batch"))
    arguments: Namespace = parser.parse_args(["-i", "-", "-o", "-", *flags])
    try:
        run_batch.validate_run_batch_args(arguments)
    except KeyError as error:
        raise UserError(f"vLLM refuses the flags: {error.args[0]}.") from None
    return arguments


def answered(settings: BatchSettings, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
    """Line numbers with answers as they come, from an engine of this machine.

    Raises:
        UserError: the engine does not start, or has died.
    """
    prepare()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    parse_flags(settings.flags)
    found: queue.SimpleQueue[tuple[int, str] | BaseException | None] = queue.SimpleQueue()
    stop: list[Callable[[], object]] = []  # ends what is under way

    async def one(to: Answering, request: Request, free: asyncio.Semaphore) -> None:
        try:
            found.put((request.line, await to.answer(request.text)))
        finally:
            free.release()

    async def all_of_them() -> None:
        free = asyncio.Semaphore(settings.at_once)
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        stop.append(lambda: loop.call_soon_threadsafe(task.cancel))
        async with answering(settings.flags) as to, asyncio.TaskGroup() as group:
            for request in requests:
                await free.acquire()
                group.create_task(one(to, request, free))

    def run() -> None:
        try:
            asyncio.run(all_of_them())
            found.put(None)
        except BaseException as error:
            found.put(error)

    worker = threading.Thread(target=run)
    with reaped():
        worker.start()
        try:
            while (next_ := found.get()) is not None:
                if isinstance(next_, BaseException):
                    raise _explained(next_)
                yield next_
        finally:
            for end in stop:
                with suppress(RuntimeError):  # its loop has ended
                    end()
            worker.join()


def _explained(error: BaseException) -> BaseException:
    if isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, EngineDied):
        return UserError("The engine has died, see above; the same command goes on where it stopped.")
    return error
