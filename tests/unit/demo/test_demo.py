"""What the demo says about exactness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from clover_vllm.base.show import print_table
from clover_vllm.demo import run as demo
from clover_vllm.demo.run import Chat, Parting, Position, exactness, parting

PLAIN = [Position(5, {5: -0.1, 6: -2.5}), Position(7, {7: -0.70, 8: -0.72}), Position(2, {2: 0.0})]


def test_texts_part_at_the_first_token_that_differs() -> None:
    assert parting(PLAIN, [5, 7, 2]) is None
    found = parting(PLAIN, [5, 8, 9])
    assert found is not None
    assert found.position == 2
    assert found.gap == pytest.approx(0.02)
    assert parting(PLAIN, [5, 7]) == Parting(3, None)


def test_a_token_that_plain_does_not_name_is_at_least_as_far_as_the_last() -> None:
    found = parting(PLAIN, [99])
    assert found is not None
    assert found.gap == pytest.approx(2.4)


def test_table_shows_equal_texts_and_gaps_by_dtype(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(
        exactness({"float32": ([PLAIN], [[5, 7, 2]]), "bfloat16": ([PLAIN, PLAIN], [[5, 8], [5, 7, 2]])})
    )
    float32, bfloat16 = (line for line in capsys.readouterr().out.splitlines() if "float" in line)
    assert "1 of 1" in float32
    assert "apart" not in float32
    assert "1 of 2" in bfloat16
    assert "token 2 (logits 0.020 apart)" in bfloat16


def test_the_demo_compares_texts_in_both_dtypes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four servers: plain and with Clover-2, each in bfloat16 and in float32, where one text of the former differs."""
    served = []

    @contextmanager
    def serving(_: Any, __: str, speculative: Any, flags: list[str]) -> Iterator[Any]:
        dtype = flags[flags.index("--dtype") + 1]
        served.append((dtype, speculative is not None))
        yield SimpleNamespace(dtype=dtype)

    def timed(server: Any, prompts: list[str], *_: Any) -> Chat:
        said = [5, 8, 2] if server.dtype == "bfloat16" else [5, 7, 2]
        return Chat([said for _ in prompts], tokens=3, seconds=1.0)

    monkeypatch.setattr(demo, "make_target", lambda name: name)
    monkeypatch.setattr(demo, "_serving", serving)
    monkeypatch.setattr(demo, "_timed", timed)
    monkeypatch.setattr(demo, "_reference", lambda _, prompts, __: [PLAIN for _ in prompts])
    demo.run_demo(2, 16)
    assert sorted(served) == [
        (dtype, clover) for dtype in ("bfloat16", "float32") for clover in (False, True)
    ]
    shown = capsys.readouterr().out.splitlines()
    (equal,) = (line for line in shown if line.startswith("│ float32"))
    (parts,) = (line for line in shown if line.startswith("│ bfloat16"))
    assert "2 of 2" in equal
    assert "0 of 2" in parts
    assert "token 2" in parts
