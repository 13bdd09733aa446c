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

T = TypeVar("T")

_ARGUMENT: Final = re.compile(r"^ {4}(\w+): ((?:.+\n?)(?: {8}.+\n?)*)", re.MULTILINE)

# --- numbers


def number(least: float, most: float | None = None, *, kind: type[float] = float) -> Any:
    """Return a function that reads a number between *least* and *most* from the command line."""
    noun = "whole number" if kind is int else "number"
    bounds = f"at least {least:g}" if most is None else f"{least:g} to {most:g}"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun}") from None
        if not least <= value < float("inf") or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"must be a {noun} of {bounds}, got {text}")
        return value

    return read


def whole_number(least: int, most: int | None = None) -> Any:
    """Return a function that reads a whole number between *least* and *most* from the command line."""
    return number(least, most, kind=int)


# --- flags


# In these functions *text* is the help of the flag.


def add_option(group: argparse._ActionsContainer, name: str, metavar: str, text: str, **options: Any) -> None:
    """Add a flag with a value; *options* are further ones of argparse."""
    group.add_argument(name, metavar=metavar, help=text, **options)


def add_switch(group: argparse._ActionsContainer, name: str, text: str) -> None:
    """Add a flag without a value."""
    group.add_argument(name, action="store_true", help=text)


def add_seconds(
    group: argparse._ActionsContainer, name: str, text: str, *, least: float = 0, default: float | None = None
) -> None:
    """Add a flag for a duration of at least *least*."""
    add_option(group, name, "SECONDS", _with_default(text, default), type=number(least), default=default)


def add_count(
    group: argparse._ActionsContainer, name: str, text: str, *, least: int = 1, default: int | None = None
) -> None:
    """Add a flag for a whole number of at least *least*."""
    add_option(group, name, "N", _with_default(text, default), type=whole_number(least), default=default)


def _with_default(text: str, default: float | None) -> str:
    return text if default is None else f"{text} (default: {default:g})"


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
    return {"type": hint, "metavar": {int: "N", float: "SECONDS"}.get(hint, "TEXT")}


# --- groups of flags


def add_bulk(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Add the flags of a command that asks about every line of a file; return the group *title* of those about its course."""
    parser.add_argument("input", metavar="INPUT.jsonl", help="the lines to ask about")
    add_question(parser.add_argument_group("what is asked"))
    add_endpoint(parser.add_argument_group("endpoint"))
    group = parser.add_argument_group(title)
    retries = "while nothing is answered, try again at growing intervals"
    text = f"{retries}, and leave the rest unasked after so long without a single answer"
    add_seconds(group, "--give-up-after", text, default=GIVE_UP_AFTER)
    add_reports(group)
    policy = """\
Bulk work waits for full batches; --max-wait, --low-max-wait, --idle and
--when-full are for live traffic and change nothing here.
"""
    add_policy(parser.add_argument_group("batching", policy))
    return group


def add_question(group: argparse._ArgumentGroup) -> None:
    """Add the flags that decide what is asked about a line of the input."""
    add_option(group, "--system", "TEXT|@FILE", "instructions, the same for every line")
    template = r"the question, with fields of the line in braces; \n and \t are newline and tab, {{ and }} are braces"
    add_option(group, "--template", "TEXT", template)
    answers = group.add_mutually_exclusive_group()
    labels = "the only answers allowed; in a file one per line, or a JSON list"
    add_option(answers, "--labels", "A,B,C|@FILE", labels)
    add_option(answers, "--schema", "FILE", "a JSON Schema to which every answer conforms")
    add_option(group, "--id-field", "FIELD", "the field that holds a line's id")
    add_count(group, "--max-tokens", "at most N tokens per answer")
    add_option(group, "--temperature", "T", "sampling temperature", type=number(0))


def add_endpoint(group: argparse._ArgumentGroup) -> None:
    """Add the flags that decide where requests are sent, and how fast."""
    add_option(group, "--model", "NAME", "the model; OpenAI Batch lines may name their own")
    add_option(group, "--base-url", "URL", "address of the API, up to /v1 (default: OPENAI_BASE_URL, else OpenAI)")
    add_rate_limits(group)
    simulate = "use a simulated endpoint within this process: the answers are made up, and nothing is paid"
    add_switch(group, "--simulate", f"{simulate} (default model: {SIMULATED_MODEL})")


def add_rate_limits(group: argparse._ActionsContainer) -> None:
    """Add `--rpm` and `--tpm`."""
    tokens = "send at most N tokens in any minute, prompts and the answers reserved for them together"
    add_count(group, "--rpm", "send at most N requests in any minute")
    add_count(group, "--tpm", tokens)


def add_cache(group: argparse._ActionsContainer, *, required: bool = False) -> None:
    """Add `--cache`."""
    text = "keep answers in FILE (SQLite), or in Redis at redis://HOST:PORT/DB, and ask nothing twice"
    add_option(group, "--cache", "FILE|URL", text, required=required)


def add_policy(group: argparse._ArgumentGroup) -> None:
    """Add the flags that decide which requests share a prompt."""
    add_switch(group, "--single", "one call for each item, to compare; same as --max-batch-size 1")
    add_switch(group, "--canary", f"{described(FallbackPolicy)['canary']} (default: off)")
    add_settings(group, FlushPolicy)


def add_reports(group: argparse._ArgumentGroup) -> None:
    """Add `--progress` and `--json`."""
    progress = "show progress (default: on a terminal)"
    group.add_argument("--progress", action=argparse.BooleanOptionalAction, default=None, help=progress)
    add_switch(group, "--json", "print the summary as a JSON object, the last line of stdout")
