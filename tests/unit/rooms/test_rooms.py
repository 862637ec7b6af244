"""Rooms know only what is below them: by import, and by names in strings."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clover_vllm

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "clover_vllm"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAYERS: list[str] = PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
LEVELS = {room: level for level, rooms in enumerate(LAYERS) for room in re.split(r"\W+", rooms)}
"""Of each room; 0 is the highest."""


def quoted(source: str) -> Iterator[str]:
    """Rooms that the strings of a source name, docstrings apart."""
    tree = ast.parse(source)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield from re.findall(r"\bclover_vllm\.(\w+)", node.value)


def reaches_up(own: str, named: str) -> bool:
    """Whether a room may not know another."""
    return named in LEVELS and named != own and LEVELS[named] <= LEVELS[own]


def test_no_string_names_a_room_that_may_not_be_imported() -> None:
    named = 0
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in LEVELS:
            found = list(quoted(path.read_text(encoding="utf-8")))
            named += len(found)
            assert not [room for room in found if reaches_up(own, room)], path
    assert named > 5


def test_strings_that_reach_up_are_seen() -> None:
    source = '"""Of clover_vllm.cli."""\nCHILD = f"{1} clover_vllm.check.child"\nOTHER = "clover_vllm.base.files:x"'
    assert sorted(quoted(source)) == ["base", "check"]
    assert reaches_up("bench", "check")
    assert reaches_up("tree", "attention")
    assert not reaches_up("bench", "base")


def test_the_plugin_is_what_vllm_finds() -> None:
    assert PROJECT["project"]["entry-points"]["vllm.general_plugins"] == {"clover": clover_vllm.PLUGIN}


def test_broken_contracts_are_found(tmp_path: Path) -> None:
    """On a copy in which the lowest rooms import the engine, and training and the command line vLLM."""
    copy = shutil.copytree(PACKAGE, tmp_path / "clover_vllm", ignore=lambda *_: {"shipped", "__pycache__"})
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, line in (
        ("tree/walk.py", "import clover_vllm.engine.options"),
        ("train/trainer.py", "import vllm"),
        ("cli.py", "import vllm"),
    ):
        with open(copy / path, "a") as file:
            file.write(f"\n\ndef _added() -> None:\n    {line}\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Contracts: 0 kept, 2 broken." in done.stdout
    for broken in ("clover_vllm.tree.walk", "clover_vllm.train.trainer", "clover_vllm.cli"):
        assert f"{broken} -> " in done.stdout
