"""Settings from the environment and from `.env` in the current directory.

The file is not trusted, because commands are run in folders that were cloned or unpacked. Only names of this package are taken, and
none that the environment has. Addresses are taken only together with a key from the same file; otherwise the file could send the
environment's key to another server.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from microbatch.cli.console import UsageError, note

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, MutableMapping, Sequence

DOTENV: Final = ".env"
KEY: Final = "OPENAI_API_KEY"
PREFIX: Final = "MICROBATCH_"

_LINE: Final = re.compile(
    r"""^[ \t]*(?:export[ \t]+)?(?P<name>(?:OPENAI|MICROBATCH)_\w+)[ \t]*=[ \t]*
    (?:'(?P<single>[^'\n]*)'|"(?P<double>(?:\\.|[^"\\\n])*)"|(?P<bare>(?:(?<![ \t])|(?!\#))[^'"\s][^\n]*?)?)
    [ \t]*(?:(?<=\s|'|")\#[^\n]*)?$""",
    re.MULTILINE | re.VERBOSE | re.ASCII,
)
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t"}

_TRUTH: Final = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


def load_dotenv(path: str = DOTENV, environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the variables of the file *path* to *environment*; those that are set, even to an empty string, are not changed.

    The file has lines of NAME=VALUE, with or without `export`, quotes and comments; `$` has no meaning. One that is missing or
    unreadable adds nothing.
    """
    try:
        text = Path(path).read_text("utf-8-sig", errors="replace")
    except OSError:
        return
    found = dict(read_dotenv(text))
    key = found.get(KEY)
    trusted = bool(key) and environment.get(KEY, key) == key
    for name, value in found.items():
        if name in environment:
            continue
        if "://" in value and not trusted:
            note(f"microbatch: {path}: {name} is ignored: addresses in this file are used only together with its {KEY}")
        else:
            environment[name] = value


def read_dotenv(text: str) -> Iterator[tuple[str, str]]:
    """Yield the OPENAI_* and MICROBATCH_* variables in *text*; other lines are skipped."""
    for line in _LINE.finditer(text.replace("\r\n", "\n")):
        name, single, double, bare = line.group("name", "single", "double", "bare")
        if double is not None:
            single = re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), double)
        yield name, single if single is not None else bare or ""


def with_environment(
    parser: argparse.ArgumentParser, words: Sequence[str], environment: Mapping[str, str]
) -> argparse.Namespace:
    """Return the flags of a command; those that are not among *words* are taken from *environment*.

    The variable of --max-wait is MICROBATCH_MAX_WAIT, and so on. Empty variables are ignored; a flag that may be repeated takes a
    list with commas. The parser must not require any flag. Raise `UsageError` if a value is wrong; the message names the variable.
    """
    args = parser.parse_args(words)
    given = {word.partition("=")[0] for word in words}
    for action in parser._actions:  # noqa: SLF001 there is no other way to list them
        variable = PREFIX + action.dest.upper()
        value = environment.get(variable, "").strip()
        if value and action.default is not argparse.SUPPRESS and not given.intersection(action.option_strings):
            try:
                setattr(args, action.dest, _read(parser, action, value))
            except (argparse.ArgumentError, ValueError) as error:
                reason = error.message if isinstance(error, argparse.ArgumentError) else str(error)
                raise UsageError(f"{variable}: {reason}") from None
    return args


def _read(parser: argparse.ArgumentParser, action: argparse.Action, value: str) -> Any:
    """Return the setting that the flag of *action* makes of *value*."""
    name, *opposite = action.option_strings
    if isinstance(action.default, list):
        words = [f"{name}={part.strip()}" for part in value.split(",") if part.strip()]
    elif action.nargs != 0:
        words = [f"{name}={value}"]
    elif value.lower() not in _TRUTH:
        raise ValueError(f"must be yes or no, got {value!r}")
    else:
        words = [name] if _TRUTH[value.lower()] else opposite
    parser.exit_on_error = False
    try:
        return getattr(parser.parse_args(words), action.dest)
    finally:
        parser.exit_on_error = True
