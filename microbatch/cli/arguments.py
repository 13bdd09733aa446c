"""Flags that several commands have, and flags made from a settings dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
import os
import re
import types
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from microbatch.cli.console import UsageError
from microbatch.cli.key_command import key_command
from microbatch.cli.reading.input import ON_EMPTY
from microbatch.cli.reading.records import FORMS
from microbatch.cli.simulated import SIMULATED_MODEL
from microbatch.errors import ConfigError
from microbatch.policy import AuditPolicy, FallbackPolicy, FlushPolicy
from microbatch.spending.budget import Budget, Per
from microbatch.spending.counters import Period
from microbatch.spool.endpoint import GIVE_UP_AFTER
from microbatch.transports.capabilities import Structured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")
Group: TypeAlias = argparse._ActionsContainer  # noqa: SLF001 a parser, or one of its groups

CONNECTION: Final = (
    *("structured", "stream_options", "first_timeout", "connect_timeout", "max_header_bytes", "trust_env", "uds"),
    *("proxy", "headers", "query", "embedding_model"),
)
"""Arguments of `OpenAIChat` that have flags of the same name, `headers` in the singular."""

TIMEOUTS: Final = ("timeout", "idle_timeout")
"""Further ones, which the gateway has settings for."""

_ARGUMENT: Final = re.compile(r"^ {4}(\w+): ((?:.+\n?)(?: {8}.+\n?)*)", re.MULTILINE)

# --- flags


def add_flag(
    group: Group,
    flag: str,
    text: str,
    *,
    default: Any = None,
    least: float | None = None,
    most: float | None = None,
    **options: Any,
) -> None:
    """Add a flag with the help *text*.

    Args:
        group: Where it is added.
        flag: The flag and its value, as the help shows them. N is a whole number, SECONDS a number; without a value it is a switch.
        text: Its help, to which the default is added.
        default: The value if it is not given.
        least: The smallest number; None for 1 if the value is N, else 0. Makes any other value a number too.
        most: The largest number.
        options: Further arguments of argparse.
    """
    name, _, value = flag.partition(" ")
    if not value:
        group.add_argument(name, action="store_true", help=text)
        return
    if default not in (None, []):
        text += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
    if least is None and value in ("N", "SECONDS"):
        least = 1 if value == "N" else 0
    if least is not None:
        options.setdefault("type", number(least, most, kind=int if value == "N" else float))
    group.add_argument(name, metavar=value, help=text, default=default, **options)


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
            finite = "" if math.isfinite(value) else "finite "
            raise argparse.ArgumentTypeError(f"must be a {finite}{noun} of {bounds}, got {text}")
        return value

    return read


# --- settings

_SEVERAL: Final = {"combine_params": "combine_param", "headers": "header"}


def flag(name: str) -> str:
    """Return the flag of a setting; one that may be given several times is named in the singular."""
    return "--" + _SEVERAL.get(name, name).replace("_", "-")


def add_settings(
    group: Group, settings: type, *, also: Mapping[str, str] = MappingProxyType({}), **defaults: Any
) -> None:
    """Add a flag for every field of the dataclass *settings*, with the help of its docstring.

    *also* are second flags of fields, and *defaults* replace those of *settings*.
    """
    hints = get_type_hints(settings)
    helps = described(settings)
    for field in dataclasses.fields(settings):
        value = defaults.get(field.name, field.default)
        default = "none" if value in (None, ()) else str(value)
        text = f"{helps.get(field.name, '')} (default: {default})".replace("%", "%%")
        options = _value_options(hints[field.name])
        if field.name in defaults:
            options["default"] = value
        flags = [flag(field.name), *([also[field.name]] if field.name in also else [])]
        group.add_argument(*flags, help=text, **options)


def described(settings: type) -> dict[str, str]:
    """Return the description of each argument in the docstring of *settings*, without its Markdown."""
    text = inspect.getdoc(settings) or ""
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    return {name: " ".join(words.split()).replace("`", "").rstrip(".") for name, words in _ARGUMENT.findall(arguments)}


def read_settings(args: argparse.Namespace, settings: type[T], **fixed: Any) -> T:
    """Return *settings* with the values of the flags; *fixed* takes precedence. Raise `UsageError` if a value is out of range."""
    names = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    values = {name: getattr(args, _SEVERAL.get(name, name)) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return settings(**{**given, **fixed})
    except ConfigError as error:
        raise UsageError(with_flags(str(error), names)) from error


def with_flags(message: str, names: Iterable[str]) -> str:
    """Return *message* with flags in place of the settings *names*, but for "query" as a word: "a query"."""
    for name in sorted(names, key=len, reverse=True):
        message = re.sub(rf"(?<!a )(?<![\w-]){name}(?!\w)(=(?=\s|$))?", flag(name), message)
    return message


def _value_options(hint: Any) -> dict[str, Any]:
    """Return the options with which argparse reads a value of the type *hint*."""
    if get_origin(hint) in (types.UnionType, Union):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Collection:
        return {"action": "append", "metavar": "NAME", "default": []}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    return {"type": hint, "metavar": {int: "N", float: "SECONDS"}.get(hint, "TEXT")}


# --- groups of flags


def add_bulk(
    parser: argparse.ArgumentParser, title: str, *, needs_cache: bool = False, sample: int | None = None, **policy: Any
) -> Group:
    """Add the flags of a command that asks about the records of files; return the group *title* of those about its course.

    *sample* is the default of `--sample`, and *policy* are defaults other than those of `FlushPolicy`.
    """
    forms = "JSON Lines, a JSON array, CSV, TSV or Parquet, each also .gz; - is stdin"
    parser.add_argument("input", metavar="INPUT", nargs="+", help=f"files with what is asked about: {forms}")
    group = parser.add_argument_group("input")
    add_input(group)
    add_flag(group, "--limit N", "read only the first N records")
    add_sample(group, sample)
    add_question(parser.add_argument_group("what is asked"))
    add_endpoint(parser.add_argument_group("endpoint"))
    group = parser.add_argument_group(title)
    add_cache(group, required=needs_cache)
    retries = "while nothing is answered, try again at growing intervals"
    text = f"{retries}, and leave the rest unasked after so long without a single answer"
    add_flag(group, "--give-up-after SECONDS", text, default=GIVE_UP_AFTER)
    add_id_seed(group)
    add_max_cost(group)
    add_reports(group)
    about = """\
Bulk work waits for full batches; --max-wait, --low-max-wait, --idle and
--when-full are for live traffic and change nothing here.
"""
    add_policy(parser.add_argument_group("batching", about), **policy)
    return group


def add_input(group: Group) -> None:
    """Add the flags that decide how the input is read."""
    form = "the format (default: that of the name, as in x.csv or x.csv.gz, else that of the content)"
    add_flag(group, "--input-format FORMAT", form, choices=FORMS)
    encoding = "the encoding of a text, such as cp1252 (default: UTF-8, or UTF-16 if the file begins so)"
    add_flag(group, "--encoding NAME", encoding)
    ids = "the field that holds a record's id (default: custom_id, else id, else the number of the line or row)"
    add_flag(group, "--id-field FIELD", ids)


def add_sample(group: Group, default: int | None) -> None:
    """Add `--sample` and `--seed`."""
    sample = "ask about N records, drawn at random, or all if there are fewer"
    add_flag(group, "--sample N", sample, default=default)
    add_flag(group, "--seed N", "another seed draws other records", type=int, default=0)


def add_question(group: Group) -> None:
    """Add the flags that decide what is asked about a record of the input."""
    add_flag(group, "--system TEXT|@FILE", "instructions, the same for every record")
    template = (
        r"the question, with fields of the record in braces; \n and \t are newline and tab, {{ and }} are braces. "
        "In a file a backslash is a backslash"
    )
    add_flag(group, "--template TEXT|@FILE", template)
    examples = (
        "examples that are shown to the model, a JSON object per line: input, fields for the template or a whole question, "
        "and output, the right answer; or messages"
    )
    add_flag(group, "--examples FILE", examples)
    empty = "what is done about a record with nothing in the fields of the template: ask, skip (the default) or fail"
    add_flag(group, "--on-empty ACTION", empty, choices=ON_EMPTY)
    answers = group.add_mutually_exclusive_group()
    labels = "the only answers allowed; in a file one per line, or a JSON list"
    add_flag(answers, "--labels A,B,C|@FILE", labels)
    add_flag(answers, "--schema FILE", "a JSON Schema to which every answer conforms")
    add_flag(group, "--max-tokens N", "at most N tokens per answer")
    add_flag(group, "--temperature T", "sampling temperature", least=0)
    param = (
        "a request parameter, as top_p=0.9 or user='\"me\"'; fields of an OpenAI Batch line come first; may be repeated"
    )
    add_flag(group, "--param NAME=JSON", param, action="append", default=[], type=_param)


def add_endpoint(group: Group) -> None:
    """Add the flags that decide where requests are sent, and how fast."""
    add_flag(group, "--model NAME", "the model; OpenAI Batch requests may name their own")
    add_flag(group, "--base-url URL", "address of the API, up to /v1 (default: OPENAI_BASE_URL, else OpenAI)")
    add_connection(group, "OPENAI_API_KEY, which is sent only to OpenAI and OPENAI_BASE_URL")
    add_flag(group, "--timeout SECONDS", "longest time of one attempt", least=0.001, default=600.0)
    idle = "longest silence of a stream that has begun to answer"
    add_flag(group, "--idle-timeout SECONDS", idle, least=0.001, default=60.0)
    add_rate_limits(group)
    simulate = "use a simulated endpoint within this process: the answers are made up, and nothing is paid"
    add_flag(group, "--simulate", f"{simulate} (default model: {SIMULATED_MODEL})")
    add_prices(group)


def add_connection(group: Group, key: str, *, uds: str = "--uds") -> None:
    """Add the flags for the key, by default *key*, and the connections, see `OpenAIChat`; *uds* is the flag of a Unix socket."""
    add_flag(group, "--api-key-env NAME", f"the environment variable that holds the key (default: {key})")
    command = "a command that prints the key; it is run without a shell, and again when the endpoint refuses the key"
    add_flag(group, "--api-key-command CMD", command)
    header = "a header of every request; may be repeated"
    add_flag(group, "--header NAME=VALUE", header, action="append", default=[], type=_pair)
    query = "a query parameter of every request, such as Azure's api-version=VERSION; may be repeated"
    add_flag(group, "--query NAME=VALUE", query, action="append", default=[], type=_pair)
    form = "how a form of the answers is asked for (default: by a schema, and from then on as the endpoint takes it)"
    add_flag(group, "--structured FORM", form, choices=get_args(Structured))
    add_flag(group, "--embedding-model NAME", "the model of embeddings, unless a request names its own")
    options = "fields of stream_options beside include_usage, as a JSON object; false sends none"
    add_flag(group, "--stream-options JSON", options, type=_json)
    add_flag(
        group, "--first-timeout SECONDS", "longest time until the first event of a stream (default: none)", least=0.001
    )
    add_flag(group, "--connect-timeout SECONDS", "longest time to open a connection", least=0.001, default=10.0)
    add_flag(group, "--max-header-bytes N", "longest header of a response", default=65_536)
    add_flag(group, "--proxy URL", "an HTTP proxy, as http://HOST:PORT")
    add_flag(group, "--trust-env", "take the proxy from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY")
    add_flag(group, f"{uds} PATH", "connect to a Unix socket; the address is a name only then")


def read_connection(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments `CONNECTION` of `OpenAIChat` as the flags have them; raise `UsageError` if a flag is repeated wrongly."""
    given = {name: getattr(args, name) for name in CONNECTION if name not in ("headers", "query")}
    if hasattr(args, "upstream_uds"):  # of a server, whose own socket is --uds
        given["uds"] = args.upstream_uds
    return {**given, "headers": read_pairs("--header", args.header), "query": read_pairs("--query", args.query)}


def read_pairs(name: str, pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Return the values of the flag *name*, which may be repeated; raise `UsageError` if it gives one twice."""
    found: dict[str, T] = {}
    for key, value in pairs:
        if key in found:
            raise UsageError(f"{name} {key}: is given twice")
        found[key] = value
    return found


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError("must be NAME=VALUE")  # the text may be a secret
    return name, value


def _param(text: str) -> tuple[str, Any]:
    name, value = _pair(text)
    try:
        return name, json.loads(value)
    except ValueError:
        hint = f"a text is written {name}='\"{value}\"'" if value.isalnum() else "quotes are part of JSON"
        raise argparse.ArgumentTypeError(f"{name}: {value!r} is not JSON; {hint}") from None


_SECRET: Final = ("--header", "--query", "--proxy")


def without_secrets(words: Iterable[str]) -> list[str]:
    """Return the *words* of a command without the values of flags that may hold secrets: "..." stands for them."""
    shown: list[str] = []
    hides = False
    for word in words:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if hides or (equals and name in _SECRET):
            key, pair, _ = value.partition("=")
            shown.append(f"{name}{equals}{key}=..." if pair else f"{name}{equals}...")
        else:
            shown.append(word)
        hides = not hides and word in _SECRET
    return shown


def read_key(args: argparse.Namespace) -> str | Callable[[], str] | None:
    """Return the key of `--api-key-env`, or the function of `--api-key-command`; None without either.

    Raises:
        UsageError: There is no key, or both flags are given.
    """
    if args.api_key_command is not None:
        if args.api_key_env:
            raise UsageError("--api-key-env and --api-key-command: give only one of them")
        return key_command(args.api_key_command)
    key = os.environ.get(args.api_key_env) if args.api_key_env else None
    if args.api_key_env and not key:
        raise UsageError(f"--api-key-env: the environment variable {args.api_key_env} is not set")
    return key


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from None


def add_rate_limits(group: Group) -> None:
    """Add `--rpm`, `--tpm` and `--limit-store`."""
    tokens = "send at most N tokens in any minute, prompts and the answers reserved for them together"
    add_flag(group, "--rpm N", "send at most N requests in any minute")
    add_flag(group, "--tpm N", tokens)
    store = "have --rpm and --tpm together with all processes that name the same Redis server, at redis://HOST:PORT/DB (default: alone)"
    add_flag(group, "--limit-store URL", store)


def add_prices(group: Group) -> None:
    """Add `--prices`."""
    form = '{"MODEL": {"input": USD, "output": USD, "cached_input": USD, "cache_write": USD, "tiers": {"flex": {...}}}}'
    text = f"prices per million tokens, before the list prices of genai-prices; a JSON file: {form}"
    add_flag(group, "--prices FILE", text)


def add_cache(group: Group, *, required: bool = False) -> None:
    """Add `--cache`."""
    text = "keep answers in FILE (SQLite), or in Redis at redis://HOST:PORT/DB, and ask nothing twice"
    add_flag(group, "--cache FILE|URL", text, required=required)


def add_id_seed(group: Group) -> None:
    """Add `--id-seed`."""
    text = "derive the ids in prompts from TEXT, so that a batch has the same prompt in every run (default: from random bytes)"
    warning = "with a TEXT that others know, an item can be written that answers for others"
    add_flag(group, "--id-seed TEXT", f"{text}; {warning}", type=_not_empty)


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def add_policy(group: Group, **defaults: Any) -> None:
    """Add the flags that decide which requests share a prompt; *defaults* take precedence over those of `FlushPolicy`."""
    add_flag(group, "--single", "one call for each item, to compare; same as --max-batch-size 1")
    add_flag(group, "--canary", f"{described(FallbackPolicy)['canary']} (default: off)")
    add_settings(group, FlushPolicy, **defaults)


def add_audit(group: Group) -> None:
    """Add `--audit` and `--max-excess`."""
    audit = (
        "ask again alone some of what was answered in batches, measure what combining does to the answers, and make "
        "batches smaller where it does harm; SHARE of the items, by default one of each batch until that is known"
    )
    add_flag(group, "--audit auto|SHARE", audit, type=_rate, nargs="?", const="auto")
    add_max_excess(group)


def add_max_excess(group: Group) -> None:
    """Add `--max-excess`."""
    excess = "share of answers that may differ because of combining, beyond the model's own noise"
    add_flag(group, "--max-excess X", excess, default=AuditPolicy().max_excess, least=0.0001, most=0.9999)


def read_audit(args: argparse.Namespace, **others: Any) -> AuditPolicy | None:
    """Return the policy of `--audit`, with *others* of its fields; None without the flag, which not all commands have."""
    return (
        None
        if getattr(args, "audit", None) is None
        else AuditPolicy(rate=args.audit, max_excess=args.max_excess, **others)
    )


def _rate(text: str) -> Any:
    if text == "auto":
        return text
    try:
        return number(0, 1)(text)
    except argparse.ArgumentTypeError:
        message = f"must be auto or a number of 0 to 1, got {text!r} (write --audit=auto if a file name follows)"
        raise argparse.ArgumentTypeError(message) from None


def add_max_cost(group: Group) -> None:
    """Add `--max-cost`."""
    text = (
        "spend at most so many US dollars, but for calls under way, by the prices of the models; then ask nothing more, and leave the "
        "rest for another run"
    )
    add_flag(group, "--max-cost USD", text, least=0)


def read_max_cost(args: argparse.Namespace) -> Budget | None:
    """Return the budget of `--max-cost`; None without the flag, which not all commands have."""
    most: float | None = getattr(args, "max_cost", None)
    return None if most is None else Budget(usd=most)


def add_budget(group: Group) -> None:
    """Add the flags of a budget that begins anew from time to time."""
    usd = (
        "spend at most so many US dollars, by the prices of the models; what would exceed it is refused with status 429"
    )
    add_flag(group, "--budget-usd USD", usd, least=0)
    add_flag(group, "--budget-tokens N", "spend at most N tokens, prompts and answers together")
    period = "after which the budget is whole again, at the turn of the UTC hour, day or month (default: never)"
    add_flag(group, "--budget-period PERIOD", period, choices=get_args(Period))
    add_flag(
        group,
        "--budget-per WHOM",
        "one budget for all, or one for each tenant",
        choices=get_args(Per),
        default="batcher",
    )
    store = "count what is spent in Redis at redis://HOST:PORT/DB, for all gateways with this flag (default: in this process)"
    add_flag(group, "--budget-store URL", store)


def read_budget(args: argparse.Namespace) -> Budget | None:
    """Return the budget of the flags, None if there is none; raise `UsageError` if they are wrong."""
    given = {name: getattr(args, f"budget_{name}") for name in ("usd", "tokens", "period", "store")}
    if args.budget_usd is None and args.budget_tokens is None:
        lost = [f"--budget-{name}" for name in ("period", "store") if given[name] is not None]
        if lost:
            raise UsageError(f"{lost[0]} needs --budget-usd or --budget-tokens")
        return None
    return Budget(**given, per=args.budget_per)


def add_reports(group: Group) -> None:
    """Add `--progress`, `--json`, `--quiet` and `--log-file`."""
    progress = "show progress (default: on a terminal)"
    group.add_argument("--progress", action=argparse.BooleanOptionalAction, default=None, help=progress)
    add_flag(group, "--json", "print the summary as a JSON object, the last line of stdout")
    add_flag(group, "--quiet", "print errors only: no progress, no summary but that of --json, no warnings")
    add_log_file(group)


def add_log_file(group: Group) -> None:
    """Add `--log-file`."""
    add_flag(
        group, "--log-file FILE", "append a line for each call, and each warning, to FILE; never any text of prompts"
    )
