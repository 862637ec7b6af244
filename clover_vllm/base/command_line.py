"""Options of a command, made from the dataclass that owns them.

A field is an option: its name, type and default are those of the field, its help is the field's text in the
docstring's section "Args". `Annotated` says the rest: `typer.Option(min=1)` for bounds (or for a help that is
computed), `typer.Argument()` for a place instead of a name, `Parsed` for a list that is written as one word, and
`LEFT_OVER` for what is no option.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields
from functools import wraps
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape
from typer.models import ParameterInfo

from clover_vllm.base.docstrings import argument_texts
from clover_vllm.base.errors import UserError

LEFT_OVER = object()
"""Marks a list of all that is no option, which the command passes on to somebody else."""
PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""`context_settings` of commands that pass something on."""

S = TypeVar("S")


@dataclass(frozen=True)
class Parsed:
    """Marks a list that the command line takes as one word, such as 1,4,16."""

    parse: Callable[[str], Any]


def numbers(text: str) -> list[int]:
    """`4,1,2` as increasing numbers.

    Raises:
        UserError: it is something else.
    """
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"{text!r} is not a list of whole numbers such as 1,2,4.") from None


def reals(text: str) -> list[float]:
    """`3e-4,1e-3` as increasing numbers.

    Raises:
        UserError: it is something else.
    """
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"{text!r} is not a list of numbers such as 3e-4,1e-3.") from None


def numbers_or_none(text: str) -> list[int]:
    """As `numbers`; none of an empty text."""
    return numbers(text) if text.strip() else []


def names(text: str) -> list[str]:
    """`plain,clover-8` as names."""
    return [part.strip() for part in text.split(",") if part.strip()]


def takes(settings: type[S]) -> Callable[[Callable[[S], None]], Callable[..., None]]:
    """Turn a function of `settings` into a command whose options are the fields of that dataclass."""
    options = {field.name: (field, kind, marks) for field, kind, marks in _options(settings)}
    passed_on = [name for name, (_, _, marks) in options.items() if LEFT_OVER in marks]
    parsers = {
        name: m.parse for name, (_, _, marks) in options.items() for m in marks if isinstance(m, Parsed)
    }
    texts = argument_texts(settings.__doc__ or "")
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_option(field, marks, texts.get(name)),
            annotation=str if name in parsers else kind,
        )
        for name, (field, kind, marks) in options.items()
        if name not in passed_on
    ]
    if passed_on:
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter("context", kind, annotation=typer.Context))

    def decorate(command: Callable[[S], None]) -> Callable[..., None]:
        @wraps(command)
        def run(**values: Any) -> None:
            for name in passed_on:
                values[name] = values.pop("context").args
            parsed = {name: parse(values[name]) for name, parse in parsers.items()}
            command(settings(**(values | parsed)))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _options(settings: type) -> Iterator[tuple[Field[Any], Any, list[Any]]]:
    """Fields, with their type and what `Annotated` says of them."""
    hints = get_type_hints(settings, include_extras=True)
    for field in fields(settings):
        hint = hints[field.name]
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        yield field, kind, marks


def _option(field: Field[Any], marks: list[Any], text: str | None) -> ParameterInfo:
    option: ParameterInfo = copy(next((m for m in marks if isinstance(m, ParameterInfo)), typer.Option()))
    option.help = escape(option.help or text or "")
    if field.default is not MISSING:
        option.default = field.default
    elif field.default_factory is not MISSING:
        option.default = ",".join(map(str, field.default_factory()))
    if option.default is False:
        option.param_decls = (f"--{field.name.replace('_', '-')}",)  # no --no-...
    return option
