"""Flags given as environment variables: MICROBATCH_MAX_WAIT for --max-wait, and so on. Flags take precedence."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from microbatch.cli.arguments import flag
from microbatch.cli.console import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PREFIX: Final = "MICROBATCH_"
_NO_FLAGS: Final = frozenset({"command", "name", "parser"})
"""Attributes that a command's parser sets beside its flags."""

_YES: Final = frozenset({"1", "true", "yes", "on"})
_NO: Final = frozenset({"0", "false", "no", "off"})


def with_environment(
    parser: argparse.ArgumentParser, words: Sequence[str], environment: Mapping[str, str]
) -> argparse.Namespace:
    """Return the flags of a command, with those that are not among *words* taken from the environment.

    Args:
        parser: The parser of the command; it must not require any flag.
        words: The words after the command.
        environment: The variables; empty ones are ignored. A flag that may be repeated takes a list with commas.

    Raises:
        UsageError: The value of a variable is wrong; the message names it.
    """
    args = parser.parse_args(words)
    defaults = vars(parser.parse_args([]))
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    for name, default in defaults.items():
        value = environment.get(PREFIX + name.upper(), "").strip()
        if value and name not in _NO_FLAGS and not given & {flag(name), flag(f"no_{name}")}:
            setattr(args, name, _read(parser, name, value, default))
    return args


def _read(parser: argparse.ArgumentParser, name: str, value: str, default: object) -> Any:
    """Return the setting *name* as its flag reads *value*."""
    words = [f"{flag(name)}={value}"]
    try:
        if isinstance(default, list):
            words = [f"{flag(name)}={part.strip()}" for part in value.split(",") if part.strip()]
        elif _is_switch(parser, name):
            if value.lower() in _NO and default is False:
                return default
            words = [flag(name if _truth(value) else f"no_{name}")]
        return getattr(_parse(parser, words), name)
    except (argparse.ArgumentError, ValueError) as error:
        reason = error.message if isinstance(error, argparse.ArgumentError) else str(error)
        raise UsageError(f"{PREFIX}{name.upper()}: {reason}") from None


def _truth(value: str) -> bool:
    if value.lower() not in _YES | _NO:
        raise ValueError(f"must be yes or no, got {value!r}")
    return value.lower() in _YES


def _is_switch(parser: argparse.ArgumentParser, name: str) -> bool:
    try:
        return isinstance(getattr(_parse(parser, [flag(name)]), name), bool)
    except argparse.ArgumentError:
        return False


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse *words*; raise `ArgumentError` for wrong ones instead of ending the process."""
    parser.exit_on_error = False
    try:
        return parser.parse_args(words)
    finally:
        parser.exit_on_error = True
