"""Files and folders appear whole or not at all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from clover_vllm.base.files import whole_file, whole_folder


def test_a_file_is_replaced_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with suppress(RuntimeError), whole_file(path) as fresh:
        fresh.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
    with whole_file(path) as fresh:
        fresh.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_at_the_end_only(tmp_path: Path) -> None:
    path = tmp_path / "head"
    for text in ("old", "new"):
        with whole_folder(path) as fresh:
            (fresh / "x").write_text(text)
    (tmp_path / ".head.1234.tmp").mkdir()  # of a killed process
    with suppress(RuntimeError), whole_folder(path) as fresh:
        (fresh / "x").write_text("half")
        raise RuntimeError
    assert (path / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["head"]
