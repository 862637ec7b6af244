"""Batches: no line is lost or answered twice, whatever is killed, and bad lines hold nothing up."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.cluster import answering, batch
from clover_vllm.cluster.batch import Request, read_requests, run_batch
from clover_vllm.cluster.settings import BatchSettings


class Killed(Exception):
    """Stands for SIGKILL: nothing that follows it runs."""


def chat(custom_id: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Say {custom_id}."}]
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, **body},
    }


def answer(request: Request) -> str:
    error = {"message": "no"} if "refuse" in request.custom_id else None
    return json.dumps({"custom_id": request.custom_id, "response": request.text, "error": error})


@pytest.fixture
def settings(tmp_path: Path) -> BatchSettings:
    """30 requests, in a file that ends without a newline."""
    lines = [json.dumps(chat(f"{'refuse' if i % 10 == 3 else 'answer'} {i}")) for i in range(30)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return BatchSettings(tmp_path / "in.jsonl", tmp_path / "out.jsonl", ("--model", "x"))


class Engine:
    """Answers in random order, and is killed after some answers."""

    def __init__(self, seed: int = 0, kill_after: int | None = None) -> None:
        self.rng = random.Random(seed)
        self.kill_after = kill_after
        self.asked = 0

    def __call__(self, settings: BatchSettings, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        del settings
        for count, request in enumerate(self.rng.sample(requests, len(requests))):
            if count == self.kill_after:
                raise Killed
            self.asked += 1
            yield request.line, answer(request)


def run_with(engine: Engine, settings: BatchSettings, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    monkeypatch.setattr(batch, "_answered", engine)
    return run_batch(settings)


class SlowEngine:
    """Stands for `Answering`: its answers have ids and times of their own, as vLLM's have."""

    def __init__(self, asked: Path) -> None:
        self._asked = asked
        self._rng = random.SystemRandom()  # another one in each process

    async def answer(self, text: str) -> str:
        line = json.loads(text)
        with self._asked.open("a") as file:
            file.write(line["custom_id"] + "\n")
        await asyncio.sleep(self._rng.uniform(0, 0.02))
        body = {"id": uuid4().hex, "created": time.time_ns(), "text": line["body"]["messages"]}
        found = json.loads(answer(Request(0, line["custom_id"], "")))
        return json.dumps({"id": uuid4().hex, **found, "response": {"request_id": uuid4().hex, "body": body}})


def lasting(output: Path) -> bytes:
    """The lines of an output but for ids and times, sorted."""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for line in lines:
        del line["id"], line["response"]["request_id"]
        del line["response"]["body"]["id"], line["response"]["body"]["created"]
    return "".join(sorted(json.dumps(line) + "\n" for line in lines)).encode()


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_repeat_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 processes get SIGKILL, and some files lose the end of a line: the output is that of an unbroken run."""
    kills, at_once = 20, 4

    @asynccontextmanager
    async def start(_flags: Sequence[str]) -> AsyncIterator[SlowEngine]:
        yield SlowEngine(tmp_path / f"asked-{os.getpid()}")

    monkeypatch.setattr(answering, "answering", start)
    monkeypatch.setattr(answering, "parse_flags", lambda _flags: None)
    lines = [json.dumps(chat(f"{'refuse' if i % 10 == 3 else 'answer'} {i}")) for i in range(300)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    unbroken, broken = (
        BatchSettings(tmp_path / "in.jsonl", tmp_path / name, ("--model", "x"), at_once)
        for name in ("unbroken.jsonl", "broken.jsonl")
    )
    started = multiprocessing.get_context("fork").Process

    def run_to_its_end(settings: BatchSettings) -> int:
        """How many it was asked."""
        process = started(target=run_batch, args=(settings,))
        process.start()
        process.join()
        assert process.exitcode == 0
        return len((tmp_path / f"asked-{process.pid}").read_text().splitlines())

    assert run_to_its_end(unbroken) == 300
    part, rng, cut = tmp_path / "broken.jsonl.part", random.Random(1), 0
    for kill in range(kills):
        before = part.stat().st_size if part.exists() else 0
        process = started(target=run_batch, args=(broken,))
        process.start()
        while kill % 3 and not (part.exists() and part.stat().st_size > before):
            time.sleep(0.001)  # every third is killed wherever it is
        time.sleep(rng.uniform(0, 0.04))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not broken.output.exists()
        if kill % 4 == 1:
            part.write_bytes(part.read_bytes()[: -rng.randrange(1, 20)])
            cut += 1
    left = part.read_bytes().count(b"\n") - 1
    assert kills < left < 300
    run_to_its_end(broken)
    assert lasting(broken.output) == lasting(unbroken.output)
    ids = [json.loads(line)["custom_id"] for line in broken.output.read_text().splitlines()]
    assert ids == [json.loads(line)["custom_id"] for line in lines]
    asked = sum(len(file.read_text().splitlines()) for file in tmp_path.glob("asked-*")) - 300
    assert 300 <= asked <= 300 + cut + 2 * kills * at_once  # under way, answered but not written, and cut
    assert not part.exists()


def test_bad_lines_are_reported_and_the_others_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        json.dumps(chat("first")),
        "{",
        "",
        "[1]",
        json.dumps(chat("first")),
        json.dumps(chat("second") | {"method": "GET"}),
        json.dumps(chat("third", stream=True)),
        json.dumps({"custom_id": "fourth", "method": "POST", "url": "/v1/chat/completions"}),
        json.dumps({"prompt": "Why?", "max_tokens": 5, "source": "x"}),
        json.dumps({"prompt": " "}),
        json.dumps({"messages": [{"role": "user", "content": "Hi"}], "custom_id": "m", "temperature": 1}),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    settings = BatchSettings(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    done = run_with(Engine(), settings, monkeypatch)
    bad = [json.loads(line) for line in (tmp_path / "out.errors.jsonl").read_text().splitlines()]
    assert [line["line"] for line in bad] == [2, 4, 5, 6, 7, 8, 10]
    assert "that of line 1" in bad[2]["error"]
    assert done == {
        "answers": 3,
        "by_an_earlier_run": 0,
        "refused_by_the_engine": 0,
        "bad_lines": len(bad),
    }
    answers = [json.loads(line) for line in settings.output.read_text().splitlines()]
    assert [a["custom_id"] for a in answers] == ["first", "9", "m"]
    body = json.loads(answers[1]["response"])["body"]
    assert body == {
        "temperature": 0,
        "max_tokens": 5,
        "messages": [{"role": "user", "content": "Why?"}],
    }
    assert json.loads(answers[2]["response"])["body"]["temperature"] == 1


def test_answers_of_another_input_or_with_other_flags_are_not_gone_on_with(
    settings: BatchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        run_with(Engine(kill_after=4), settings, monkeypatch)
    other = BatchSettings(settings.input, settings.output, ("--model", "y"))
    with pytest.raises(UserError, match="other flags") as found:
        run_with(Engine(), other, monkeypatch)
    one_sentence(found.value)
    settings.input.write_text(json.dumps(chat("new")))
    with pytest.raises(UserError, match="other input") as found:
        run_with(Engine(), settings, monkeypatch)
    one_sentence(found.value)


def test_files_that_are_in_the_way_are_left_alone(
    settings: BatchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.output.write_text("mine\n")
    with pytest.raises(UserError, match="remove it") as found:
        run_with(Engine(), settings, monkeypatch)
    one_sentence(found.value)
    assert settings.output.read_text() == "mine\n"


def test_two_runs_do_not_write_one_output(settings: BatchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(settings: BatchSettings, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        with pytest.raises(UserError, match="Another run") as found:
            run_with(Engine(), settings, monkeypatch)
        one_sentence(found.value)
        yield from Engine()(settings, requests)

    monkeypatch.setattr(batch, "_answered", second)
    assert run_batch(settings)["answers"] == 30


def test_an_input_without_requests_is_refused(tmp_path: Path) -> None:
    for name, text in (("empty.jsonl", ""), ("bad.jsonl", "x\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="no request") as found:
            run_batch(BatchSettings(tmp_path / name, tmp_path / "out.jsonl"))
        one_sentence(found.value)
    with pytest.raises(UserError, match="does not exist"):
        read_requests(tmp_path / "none.jsonl")
