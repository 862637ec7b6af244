"""Where a result comes from, without what is true of one machine alone."""

from __future__ import annotations

import sys

import pytest

from clover_vllm.base.provenance import provenance


def test_commands_are_recorded_without_folders_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "/opt/venv/bin/clover-vllm",
        "bench",
        "--output",
        "/home/me/measured",
        "--head=/a/b",
        "--target=c/x",
    ]
    monkeypatch.setattr(sys, "argv", given)
    assert provenance()["command"] == "clover-vllm bench --output measured --head=b --target=c/x"
