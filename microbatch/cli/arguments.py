"""Flags that several commands have, and flags made from a settings dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from microbatch.cli.console import UsageError
from microbatch.cli.simulated import SIMULATED_MODEL
from microbatch.errors import ConfigError
from microbatch.policy import FallbackPolicy, FlushPolicy
from microbatch.spool.endpoint import GIVE_UP_AFTER
from microbatch.spool.records import MAX_ALONE

T = TypeVar("T")

POLICY: Final = """\
Bulk work waits for full batches; --max-wait, --low-max-wait, --idle and
--when-full are for live traffic and change nothing here.
"""
_ARGUMENT: Final = re.compile(r"^ {4}(\w+): ((?:.+\n?)(?: {8}.+\n?)*)", re.MULTILINE)

# --- numbers


def number(least: float, most: float | None = None) -> Any:
    """Return a function that reads a number between *least* and *most* from the command line."""

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
    """Return a function that reads a whole number between *least* and *most* from the command line."""

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


def add_seconds(
    group: argparse._ActionsContainer, name: str, text: str, *, least: float = 0, default: float | None = None
) -> None:
    """Add a flag for a duration; *text* is its help, to which a *default* is added."""
    shown = text if default is None else f"{text} (default: {default:g})"
    group.add_argument(name, metavar="SECONDS", type=number(least), default=default, help=shown)


def add_count(
    group: argparse._ActionsContainer, name: str, text: str, *, least: int = 1, default: int | None = None
) -> None:
    """Add a flag for a whole number; *text* is its help, to which a *default* is added."""
    shown = text if default is None else f"{text} (default: {default})"
    group.add_argument(name, metavar="N", type=whole_number(least), default=default, help=shown)


# --- settings


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def add_settings(group: argparse._ActionsContainer, settings: type) -> None:
    """Add a flag for every field of the dataclass *settings*, with the help of its docstring."""
    hints = get_type_hints(settings)
    helps = described(settings)
    for field in dataclasses.fields(settings):
        default = "none" if field.default is None else str(field.default)
        text = f"{helps.get(field.name, '')} (default: {default})".replace("%", "%%")
        group.add_argument(flag(field.name), default=None, help=text, **_value_options(hints[field.name]))


def described(settings: type) -> dict[str, str]:
    """Return the description of each argument in the docstring of *settings*, without its Markdown."""
    text = inspect.getdoc(settings) or ""
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    return {name: " ".join(words.split()).replace("`", "").rstrip(".") for name, words in _ARGUMENT.findall(arguments)}


def read_settings(args: argparse.Namespace, settings: type[T], **fixed: Any) -> T:
    """Return *settings* with the values of the flags; *fixed* takes precedence.

    Raises:
        UsageError: A value is out of range; the message names the flag.
    """
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        return settings(**{**given, **fixed})
    except ConfigError as error:
        message = str(error)
        for name in sorted(names, key=len, reverse=True):
            message = re.sub(rf"(?<![\w-]){name}(?!\w)", flag(name), message)
        raise UsageError(message) from error


def _value_options(hint: Any) -> dict[str, Any]:
    """Return the options with which argparse reads a value of the type *hint*."""
    if get_origin(hint) in (types.UnionType, Union):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {"type": hint, "metavar": "N" if hint is int else "SECONDS" if hint is float else "TEXT"}


# --- groups of flags


def add_question(group: argparse._ArgumentGroup) -> None:
    """Add the flags that decide what is asked about a line of the input."""
    group.add_argument("--system", metavar="TEXT|@FILE", help="instructions, the same for every line")
    group.add_argument(
        "--template",
        metavar="TEXT",
        help=r"the question, with fields of the line in braces; \n and \t are newline and tab, {{ and }} are braces",
    )
    answers = group.add_mutually_exclusive_group()
    answers.add_argument(
        "--labels", metavar="A,B,C|@FILE", help="the only answers allowed; in a file one per line, or a JSON list"
    )
    answers.add_argument("--schema", metavar="FILE", help="a JSON Schema to which every answer conforms")
    group.add_argument("--id-field", metavar="FIELD", help="the field that holds a line's id")
    add_count(group, "--max-tokens", "most tokens of one answer")
    group.add_argument("--temperature", metavar="T", type=number(0), help="sampling temperature")


def add_endpoint(group: argparse._ArgumentGroup) -> None:
    """Add the flags that decide where requests are sent, and how fast."""
    group.add_argument("--model", metavar="NAME", help="the model; OpenAI Batch lines may name their own")
    group.add_argument(
        "--base-url", metavar="URL", help="address of the API, up to /v1 (default: OPENAI_BASE_URL, else OpenAI)"
    )
    add_rate_limits(group)
    group.add_argument(
        "--simulate",
        action="store_true",
        help="use a simulated endpoint within this process: the answers are made up, and nothing is paid "
        f"(default model: {SIMULATED_MODEL})",
    )


def add_rate_limits(group: argparse._ActionsContainer) -> None:
    """Add `--rpm` and `--tpm`."""
    add_count(group, "--rpm", "send at most N requests in any minute")
    add_count(group, "--tpm", "send at most N tokens in any minute, prompts and the answers reserved for them together")


def add_cache(group: argparse._ActionsContainer, *, required: bool = False) -> None:
    """Add `--cache`."""
    group.add_argument(
        "--cache",
        metavar="FILE|URL",
        required=required,
        help="keep answers in FILE (SQLite), or in Redis at redis://HOST:PORT/DB, and ask nothing twice",
    )


def add_max_alone(group: argparse._ActionsContainer, text: str) -> None:
    """Add `--max-alone`, with the help *text*."""
    add_count(group, "--max-alone", text, default=MAX_ALONE)


def add_policy(group: argparse._ArgumentGroup) -> None:
    """Add the flags that decide which requests share a prompt."""
    group.add_argument(
        "--single", action="store_true", help="one call for each item, to compare; same as --max-batch-size 1"
    )
    group.add_argument("--canary", action="store_true", help=f"{described(FallbackPolicy)['canary']} (default: off)")
    add_settings(group, FlushPolicy)


def add_give_up_after(group: argparse._ArgumentGroup) -> None:
    """Add `--give-up-after`."""
    text = (
        "while nothing is answered, try again at growing intervals, and leave the rest unasked after so long without a "
        "single answer"
    )
    add_seconds(group, "--give-up-after", text, default=GIVE_UP_AFTER)


def add_reports(group: argparse._ArgumentGroup) -> None:
    """Add `--progress` and `--json`."""
    group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None, help="show progress (default: on a terminal)"
    )
    group.add_argument(
        "--json", action="store_true", help="print the summary as a JSON object, the last line of stdout"
    )
