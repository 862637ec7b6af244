"""Processes that are asked in lines of JSON."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small import one_sentence

from clover_vllm.base.errors import UserError
from clover_vllm.launch.process import JsonProcess

SUPPORT = str(Path(__file__).parents[2] / "support")


@pytest.fixture
def child() -> JsonProcess:
    paths = os.pathsep.join([SUPPORT, os.environ.get("PYTHONPATH", "")])
    return JsonProcess("answering_child", "the test", {"PYTHONPATH": paths})


def test_answers_come_in_order_whatever_else_is_printed(child: JsonProcess) -> None:
    with child:
        assert child.ask({"number": 3}) == {"ready": True}
        assert [child.ask({"number": n}) for n in (1, 2)] == [{"sum": 4}, {"sum": 5}]


def test_a_child_that_ends_shows_its_log(child: JsonProcess, capfd: pytest.CaptureFixture[str]) -> None:
    with child:
        child.ask({"number": 3})
        with pytest.raises(UserError) as caught:
            child.ask({"number": None})
    one_sentence(caught.value)
    shown = capfd.readouterr().err
    assert "asked for None" in shown
    assert "TypeError" in shown
