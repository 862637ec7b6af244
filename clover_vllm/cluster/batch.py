"""`clover-vllm batch`: files of requests in, answers out, on one machine or on a Ray cluster.

Requests are the lines of OpenAI's batch files, or prompts. They are answered by vLLM's own `run-batch` code
(`cluster.answering`). Each answer is appended to a file beside the output as it comes, with the number of its line, so
that a run which was killed goes on where it stopped; the output itself appears once it is whole, in the order of the
input. Lines that are no requests are reported in a second file and hold nothing up.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clover_vllm.base.errors import UserError
from clover_vllm.base.files import files_key, open_text, whole_file
from clover_vllm.base.progress import Work
from clover_vllm.cluster.settings import BatchSettings

CHAT = "/v1/chat/completions"
PROMPT_KEYS = ("prompt", "messages", "turns")
NOT_OF_A_BODY = ("prompt", "turns", "custom_id", "source", "category")
"""Keys of a line with a prompt that are no parameters of its request."""


@dataclass(frozen=True)
class Request:
    """A line that can be answered."""

    line: int  # its number, from 1
    custom_id: str
    text: str  # as a line of OpenAI's batch files


@dataclass(frozen=True)
class BadLine:
    """A line that is no request."""

    line: int
    error: str


def run_batch(settings: BatchSettings) -> dict[str, int]:
    """Answer what is missing.

    Returns:
        how many requests are answered, by an earlier run among them, and refused by the engine among them; and how
        many lines were bad.

    Raises:
        UserError: anything that the user can mend.
    """
    requests, bad = read_requests(settings.input)
    report = settings.output.with_suffix(".errors.jsonl")
    if bad:
        _write_lines(report, ({"line": b.line, "error": b.error} for b in bad))
    else:
        report.unlink(missing_ok=True)
    if not requests:
        raise UserError(f"{settings.input} holds no request" + (f"; see {report}." if bad else "."))
    if _is_whole(settings.output, requests):
        settings.output.with_name(f"{settings.output.name}.part").unlink(missing_ok=True)
        return {"answers": len(requests), "by_an_earlier_run": len(requests), "bad_lines": len(bad)}
    answers = Answers(settings, {r.line for r in requests})
    found = len(answers.lines)
    missing = [r for r in requests if r.line not in answers.lines]
    with _ends_on_sigterm(), Work("answers", len(requests)) as work:
        work.advance(found)
        if missing:
            for line, text in _answered(settings, missing):
                answers.add(line, text)
                work.advance()
    if lost := len(requests) - len(answers.lines):
        raise UserError(f"{lost} requests got no answer; the same command goes on where it stopped.")
    return {
        "answers": len(requests),
        "by_an_earlier_run": found,
        "refused_by_the_engine": answers.finish(),
        "bad_lines": len(bad),
    }


def _answered(settings: BatchSettings, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
    """Line numbers with answers, as they come."""
    if settings.ray:
        from clover_vllm.cluster import through_ray

        return through_ray.answered(settings, requests)
    from clover_vllm.cluster import answering

    return answering.answered(settings, requests)


def read_requests(path: Path) -> tuple[list[Request], list[BadLine]]:
    """All lines of a file, by whether they can be answered.

    Raises:
        UserError: the file cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    requests: list[Request] = []
    bad: list[BadLine] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(open_text(path), 1):
        if not text.strip():
            continue
        try:
            request = _parse(number, text)
            if (first := seen.setdefault(request.custom_id, number)) != number:
                raise ValueError(f"custom_id {request.custom_id!r} is that of line {first} too")
            requests.append(request)
        except ValueError as error:
            bad.append(BadLine(number, " ".join(str(error).split())))
    return requests, bad


def _parse(number: int, text: str) -> Request:
    """
    Raises:
        ValueError: it is no request.
    """
    from vllm.entrypoints.launchers.run_batch import BatchRequestInput

    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    if "url" not in line and any(key in line for key in PROMPT_KEYS):
        line = _of_prompt(number, line)
    made = BatchRequestInput.model_validate(line)  # a pydantic ValidationError is a ValueError
    if made.method != "POST":
        raise ValueError(f"method {made.method!r} is not POST")
    if getattr(made.body, "stream", False):
        raise ValueError("an answer in a file cannot be streamed; remove stream")
    return Request(number, made.custom_id, json.dumps(line))


def _of_prompt(number: int, line: dict[str, Any]) -> dict[str, Any]:
    """A line with a prompt as a chat request: greedy, unless it says something else."""
    if "messages" in line:
        messages = line["messages"]
    else:
        content = line["prompt"] if "prompt" in line else (line["turns"] or [None])[0]
        if not isinstance(content, str) or not content.strip():
            raise ValueError("the prompt is empty or no text")
        messages = [{"role": "user", "content": content}]
    more = {key: value for key, value in line.items() if key not in NOT_OF_A_BODY}
    body = {"temperature": 0, **more, "messages": messages}
    return {"custom_id": str(line.get("custom_id", number)), "method": "POST", "url": CHAT, "body": body}


class Answers:
    """The answers so far, in a file beside the output.

    Its first line says what they are answers to. A line is written in one call; one that a kill has cut short is cut
    off by the next run.

    Attributes:
        lines: numbers of the input's lines that are answered.
    """

    def __init__(self, settings: BatchSettings, wanted: set[int]) -> None:
        """
        Args:
            settings: of the run.
            wanted: numbers of the lines to answer.

        Raises:
            UserError: the file belongs to a run of another input or with other flags, or cannot be written.
        """
        self._output = settings.output
        self._path = settings.output.with_name(f"{settings.output.name}.part")
        # Replicas and requests at a time change nothing in the answers.
        head = {"input": files_key([settings.input]), "flags": list(settings.flags)}
        self.lines: set[int] = set()
        self._file = open(self._path, "a+b")  # noqa: SIM115 (closed by `finish`)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"Another run is writing {self._path}.") from None
        end = self._read(head, wanted)
        self._file.truncate(end)
        if not end:
            self._append(head)

    def _read(self, head: dict[str, Any], wanted: set[int]) -> int:
        """What an earlier run has left; returns where its last whole line ends."""
        end = 0
        self._file.seek(0)
        for raw in self._file:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            if not isinstance(line, dict):
                break
            if not end and line != head:
                changed = "input" if line.get("input") != head["input"] else "flags"
                raise UserError(
                    f"{self._path} was begun with other {changed}; go on with those, or remove the file."
                )
            if end:
                if line["line"] not in wanted or line["line"] in self.lines:
                    break
                self.lines.add(line["line"])
            end += len(raw)
        return end

    def add(self, line: int, answer: str) -> None:
        """Keep an answer, a line of OpenAI's batch output."""
        if line not in self.lines:  # Ray may have computed one twice
            self.lines.add(line)
            self._append({"line": line, "answer": json.loads(answer)})

    def _append(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()

    def finish(self) -> int:
        """Write the output, in the order of the input. Returns how many requests the engine refused."""
        self._file.close()
        places = []
        with open(self._path, "rb") as file:
            file.readline()
            at = file.tell()
            for raw in file:
                places.append((json.loads(raw)["line"], at))
                at += len(raw)
            refused = 0
            with whole_file(self._output) as fresh, open(fresh, "w", encoding="utf-8") as out:
                for _, at in sorted(places):
                    file.seek(at)
                    answer = json.loads(file.readline())["answer"]
                    refused += answer["error"] is not None
                    out.write(json.dumps(answer) + "\n")
        self._path.unlink()
        return refused


def _is_whole(output: Path, requests: Sequence[Request]) -> bool:
    """Whether an earlier run has finished.

    Raises:
        UserError: the output is something else.
    """
    if not output.exists():
        return False
    try:
        ids = [json.loads(line)["custom_id"] for line in open_text(output)]
    except (ValueError, KeyError, TypeError):
        ids = []
    if ids != [r.custom_id for r in requests]:
        raise UserError(f"{output} exists and does not answer this input; remove it or name another file.")
    return True


def _write_lines(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    with whole_file(path) as fresh, open(fresh, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, engines included."""
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
