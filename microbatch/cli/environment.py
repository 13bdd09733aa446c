"""Flags that may be given as environment variables: MICROBATCH_MAX_WAIT for --max-wait, and so on. A flag comes first."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from microbatch.cli.console import UsageError
from microbatch.cli.flags import flag

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PREFIX: Final = "MICROBATCH_"
_NO_FLAGS: Final = frozenset({"command", "name", "parser"})
"""What a command's parser sets beside its flags."""

_YES: Final = frozenset({"1", "true", "yes", "on"})
_NO: Final = frozenset({"0", "false", "no", "off"})


def with_environment(
    parser: argparse.ArgumentParser, words: Sequence[str], environment: Mapping[str, str]
) -> argparse.Namespace:
    """Return the flags of a command, with those that are not among *words* taken from the environment.

    Args:
        parser: The command's; it must not insist on any flag.
        words: What follows the command.
        environment: The variables; empty ones count as not set. A flag that may be repeated takes a list with commas.

    Raises:
        UsageError: The value of a variable is wrong; the message names it.
    """
    args = parser.parse_args(words)
    nothing = vars(parser.parse_args([]))
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    for name, usual in nothing.items():
        value = environment.get(PREFIX + name.upper(), "").strip()
        if value and name not in _NO_FLAGS and not given & {flag(name), flag(f"no_{name}")}:
            setattr(args, name, _read(parser, name, value, usual))
    return args


def _read(parser: argparse.ArgumentParser, name: str, value: str, usual: object) -> Any:
    """Return what the flag of the setting *name* makes of *value*."""
    try:
        for words in _spellings(parser, name, value, usual):
            return getattr(_parse(parser, words), name)
    except (argparse.ArgumentError, ValueError) as error:
        reason = error.message if isinstance(error, argparse.ArgumentError) else str(error)
        raise UsageError(f"{PREFIX}{name.upper()}: {reason}") from None
    return usual


def _spellings(parser: argparse.ArgumentParser, name: str, value: str, usual: object) -> Iterator[list[str]]:
    if isinstance(usual, list):
        yield [f"{flag(name)}={part.strip()}" for part in value.split(",") if part.strip()]
    elif _is_switch(parser, name):
        if value.lower() not in _YES | _NO:
            raise ValueError(f"must be yes or no, got {value!r}")
        if value.lower() in _YES:
            yield [flag(name)]
        elif usual is not False:
            yield [flag(f"no_{name}")]
    else:
        yield [f"{flag(name)}={value}"]


def _is_switch(parser: argparse.ArgumentParser, name: str) -> bool:
    try:
        return isinstance(getattr(_parse(parser, [flag(name)]), name), bool)
    except argparse.ArgumentError:
        return False


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Parse *words*, raising what is wrong with them instead of ending the process."""
    parser.exit_on_error = False
    try:
        return parser.parse_args(words)
    finally:
        parser.exit_on_error = True
