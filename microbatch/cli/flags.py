"""Flags made from a settings dataclass, so that the two cannot drift apart."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from microbatch.cli.console import UsageError
from microbatch.errors import ConfigError

T = TypeVar("T")

_PATTERN = re.compile(r"^ {4}(\w+): ((?:.+\n?)(?: {8}.+\n?)*)", re.MULTILINE)


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def add_settings(parser: argparse._ActionsContainer, settings: type) -> None:
    """Add a flag for every field of the dataclass *settings*, with the help of its docstring."""
    hints = get_type_hints(settings)
    helps = described(settings)
    for field in dataclasses.fields(settings):
        parser.add_argument(
            flag(field.name),
            default=None,
            help=_escaped(f"{helps.get(field.name, '')} (default: {_shown(field.default)})"),
            **_reading(hints[field.name]),
        )


def described(settings: type) -> dict[str, str]:
    """Return what the docstring of *settings* says of each argument, without its Markdown."""
    text = inspect.getdoc(settings) or ""
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    return {name: " ".join(words.split()).replace("`", "").rstrip(".") for name, words in _PATTERN.findall(arguments)}


def read_settings(args: argparse.Namespace, settings: type[T], **fixed: Any) -> T:
    """Return *settings* with what the flags say; *fixed* comes before them.

    Raises:
        UsageError: A value is out of range; the message names the flag.
    """
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        return settings(**{**given, **fixed})
    except ConfigError as error:
        raise UsageError(in_flags(str(error), names)) from error


def in_flags(message: str, names: list[str]) -> str:
    """Return *message* with the names of settings written as their flags."""
    for name in sorted(names, key=len, reverse=True):
        message = re.sub(rf"(?<![\w-]){name}(?!\w)", flag(name), message)
    return message


def _reading(hint: Any) -> dict[str, Any]:
    """Return how argparse is to read a value of the type *hint*."""
    if get_origin(hint) in (types.UnionType, Union):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {"type": hint, "metavar": "N" if hint is int else "SECONDS" if hint is float else "TEXT"}


def _shown(default: object) -> str:
    return "none" if default is None else str(default)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def number(least: float, most: float | None = None) -> Any:
    """Return what reads a number between *least* and *most* from the command line."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not value >= least or value == float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number of at least {least:g}, got {text}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most:g}, got {text}")
        return value

    return read


def whole_number(least: int, most: int | None = None) -> Any:
    """Return what reads a whole number between *least* and *most* from the command line."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number of {bounds}, got {text}")
        return value

    return read
