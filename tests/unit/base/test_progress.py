"""Long commands say what is done and what is left."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from clover_vllm.base.progress import Work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_now_and_then(clock: list[float]) -> None:
    log = io.StringIO()
    with Work("runs", 100, console=Console(file=log)) as work:
        work.doing("clover-8")
        for _ in range(100):
            clock[0] += 1
            work.advance()
    lines = log.getvalue().splitlines()
    assert lines == [
        "0 of 100 runs; clover-8; 0:00:00 elapsed",
        "30 of 100 runs; clover-8; 0:00:30 elapsed; about 0:01:10 left",
        "60 of 100 runs; clover-8; 0:01:00 elapsed; about 0:00:40 left",
        "90 of 100 runs; clover-8; 0:01:30 elapsed; about 0:00:10 left",
        "100 of 100 runs; clover-8; 0:01:40 elapsed",
    ]


@pytest.mark.usefixtures("clock")
def test_a_terminal_gets_a_bar_instead() -> None:
    screen = io.StringIO()
    with Work("runs", 2, console=Console(file=screen, force_terminal=True)) as work:
        work.advance(2)
    assert "2/2" in screen.getvalue()
    assert "elapsed" not in screen.getvalue()


@pytest.mark.usefixtures("clock")
def test_work_without_an_end_is_counted() -> None:
    log = io.StringIO()
    with Work("requests", None, console=Console(file=log)) as work:
        work.advance(60)
    assert log.getvalue() == "60 requests; 0:00:00 elapsed\n"
