"""Commands made from dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer
from small import one_sentence
from typer.testing import CliRunner

from clover_vllm.base.command_line import LEFT_OVER, PASSES_ON, Parsed, names, numbers, takes
from clover_vllm.base.errors import UserError


@dataclass
class Settings:
    """What is asked for.

    Args:
        output: A file [in a folder].
        counts: Several numbers,
            of which this is the help.
        rate: At most 1.
        sweep: A switch.
        scale: A switch that is on.
        paths: Several.
    """

    output: Path
    counts: Annotated[list[int], Parsed(numbers)] = field(default_factory=lambda: [1, 4])
    rate: Annotated[float, typer.Option(max=1)] = 0.5
    sweep: bool = False
    scale: bool = True
    paths: list[Path] | None = None
    method: Annotated[str, typer.Option(help=f"One of {3}.")] = "plain"


@dataclass
class Passing:
    """What is asked for.

    Args:
        output: A file.
    """

    output: Path
    flags: Annotated[list[str], LEFT_OVER] = field(default_factory=list)


def run(*arguments: str) -> tuple[str, list[Settings]]:
    """Output of a command of `Settings`, and what it was called with."""
    called: list[Settings] = []
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @takes(Settings)
    def command(settings: Settings) -> None:
        """Do it."""
        called.append(settings)

    return CliRunner().invoke(app, arguments, env={"COLUMNS": "160"}).output, called


def test_fields_are_options_and_defaults_hold() -> None:
    assert run("--output", "a")[1] == [Settings(Path("a"))]
    given = ("--counts", "4,2,4", "--rate", "1", "--sweep", "--no-scale", "--paths", "b", "--paths", "c")
    assert run("--output", "a", *given, "--method", "x")[1] == [
        Settings(Path("a"), [2, 4], 1.0, True, False, [Path("b"), Path("c")], "x")
    ]


def test_what_is_no_option_or_out_of_bounds_is_refused() -> None:
    for wrong in ([], ["--output", "a", "--rate", "2"], ["--output", "a", "--flags", "b"]):
        assert run(*wrong)[1] == []
    assert run("--output", "a", "--no-sweep")[1] == []  # a switch that is off needs no second name


def test_help_is_the_docstrings() -> None:
    output, _ = run("--help")
    for text in (
        "Do it.",
        "A file [in a folder].",
        "Several numbers, of which this is the help. [default: 1,4]",
        "At most 1.",
        "--no-scale",
        "One of 3.",
    ):
        assert text in output


def test_what_is_no_option_is_passed_on_where_it_is_wanted() -> None:
    called: list[Passing] = []
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command(context_settings=PASSES_ON)
    @takes(Passing)
    def command(settings: Passing) -> None:
        """Do it."""
        called.append(settings)

    more = ["--rank", "2", "--output", "a", "--on", "--share=0.5", "x"]
    assert CliRunner().invoke(app, more).exit_code == 0
    assert called == [Passing(Path("a"), ["--rank", "2", "--on", "--share=0.5", "x"])]
    assert "--flags" not in CliRunner().invoke(app, ["--help"]).output


def test_lists_are_written_with_commas() -> None:
    assert numbers("4,1,4") == [1, 4]
    assert names("plain, clover-8,") == ["plain", "clover-8"]
    with pytest.raises(UserError) as caught:
        numbers("1;2")
    one_sentence(caught.value)
