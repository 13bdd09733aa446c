"""The settings of a command that sends requests, read from its flags and checked before anything is sent.

The functions raise `UsageError` if a flag, or a file that it names, is wrong, and `ConfigError` if a cache or spool cannot be used.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.caching.guard import Guard
from microbatch.caching.redis import RedisCache
from microbatch.caching.sqlite import SQLiteCache
from microbatch.cli.arguments import (
    CONNECTION,
    TIMEOUTS,
    flag,
    read_audit,
    read_connection,
    read_key,
    read_max_cost,
    read_pairs,
    read_settings,
    with_flags,
)
from microbatch.cli.console import UsageError, remark
from microbatch.cli.prices import read_prices
from microbatch.cli.reading.examples import read_examples
from microbatch.cli.reading.input import Input
from microbatch.cli.reading.questions import BatchLines, Questions, Templated, payload_of
from microbatch.cli.semantic import semantic_cache
from microbatch.cli.simulated import SIMULATED_MODEL, SimulatedChat
from microbatch.errors import ConfigError
from microbatch.messages import Request
from microbatch.policy import FallbackPolicy, FlushPolicy
from microbatch.spool.redis import RedisSpool
from microbatch.spool.sqlite import SQLiteSpool
from microbatch.storage.address import is_address, is_nearly_address
from microbatch.transports.openai_chat import OpenAIChat
from microbatch.transports.rate_limit import RateLimit

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from microbatch.accounting.prices import Price
    from microbatch.policy import AuditPolicy
    from microbatch.semantic.cache import SemanticCache
    from microbatch.spending.budget import Budget
    from microbatch.spool.records import Spool

_STEP_TIMEOUT: Final = 5.0
"""Seconds for each exchange with a Redis server that holds a cache."""
_UNSENT: Final = "unsent"
"""Stands for the key where nothing is sent."""
CACHE_PATIENCE: Final = 10.0
"""Seconds for which a failing call of a cache is repeated, because each miss has to be paid for."""


class Plan(msgspec.Struct, frozen=True):
    """Where a command sends requests, and how."""

    transport: OpenAIChat | SimulatedChat
    policy: FlushPolicy
    fallback: FallbackPolicy
    rate_limit: RateLimit | None
    cache: Guard | None
    semantic: SemanticCache | None = None
    id_seed: str | None = None
    audit: AuditPolicy | None = None
    budget: Budget | None = None
    prices: dict[str, Price] | None = None

    @property
    def single(self) -> bool:
        """True if every request is sent alone."""
        return self.policy.max_batch_size == 1

    @property
    def simulated(self) -> str | None:
        """The models whose prices are shown for the simulated endpoint, in words; None if the endpoint is a real one."""
        return self.transport.models if isinstance(self.transport, SimulatedChat) else None


def read_plan(args: argparse.Namespace) -> Plan:
    """Return the settings of the flags."""
    cache = None if args.cache is None else Guard(cache_at(args.cache), patience=CACHE_PATIENCE)
    return Plan(
        policy=read_policy(args),
        fallback=FallbackPolicy(canary=args.canary),
        rate_limit=read_rate_limit(args),
        cache=cache,
        semantic=semantic_cache(args, cache),
        audit=read_audit(args),
        transport=_simulated(args) if args.simulate else _read_transport(args),
        id_seed=args.id_seed,
        budget=read_max_cost(args),
        prices=read_prices(args),
    )


def prepare(args: argparse.Namespace, *, draw: bool = True) -> tuple[Plan, Input]:
    """Return the settings and the checked input of a command with the flags of `add_bulk`; with *draw* only `--sample` of it."""
    questions = read_questions(args, needs_model=not args.model and not args.simulate)
    plan = read_plan(args)
    sample = args.sample if draw else None
    return plan, read_input(args, args.input, questions, limit=args.limit, sample=sample, seed=args.seed)


def read_input(args: argparse.Namespace, paths: Sequence[str], questions: Questions, **selection: Any) -> Input:
    """Return the checked input in the files *paths*, read by the flags of `add_input`; *selection* are further arguments of `Input`."""
    how = {"id_field": args.id_field, "form": args.input_format, "encoding": args.encoding}
    source = Input(paths, questions, **how, on_empty=args.on_empty or "skip", **selection)
    if not source.items and not source.skipped:
        remark(f"{source.label}: no records.")
    return source


def read_policy(args: argparse.Namespace) -> FlushPolicy:
    """Return the policy of the flags."""
    if not args.single:
        return read_settings(args, FlushPolicy)
    if args.max_batch_size not in (None, 1):
        raise UsageError(f"--single means --max-batch-size 1, but --max-batch-size {args.max_batch_size} is given too")
    return read_settings(args, FlushPolicy, max_batch_size=1)


def read_rate_limit(args: argparse.Namespace, *, processes: int = 1) -> RateLimit | None:
    """Return the limit of `--rpm`, `--tpm` and `--limit-store`, without a store its part for one of so many *processes*, or None."""
    if args.rpm or args.tpm:
        share = 1.0 if args.limit_store is not None else 1 / processes
        return RateLimit(rpm=args.rpm, tpm=args.tpm, share=share, store=args.limit_store)
    if args.limit_store is not None:
        raise UsageError("--limit-store needs --rpm or --tpm")
    return None


def _simulated(args: argparse.Namespace) -> SimulatedChat:
    return SimulatedChat(args.model or SIMULATED_MODEL, args.embedding_model)


def _read_transport(args: argparse.Namespace) -> OpenAIChat:
    own = _UNSENT if getattr(args, "dry_run", False) else read_key(args)
    elsewhere = args.base_url or args.uds or os.environ.get("OPENAI_BASE_URL")
    if not (own or elsewhere or os.environ.get("OPENAI_API_KEY")):
        raise UsageError(
            "no API key: set the environment variable OPENAI_API_KEY, give --base-url for an endpoint that needs none, "
            "or --simulate to try without one"
        )
    times = {name: getattr(args, name) for name in TIMEOUTS}
    connection = read_connection(args)
    try:
        return OpenAIChat(args.model or None, base_url=args.base_url, api_key=own, **times, **connection)
    except ConfigError as error:
        message = with_flags(str(error), CONNECTION)
        message = message.replace("base_url", "--base-url" if args.base_url else "OPENAI_BASE_URL")
        raise UsageError(message.replace("api_key", args.api_key_env or "OPENAI_API_KEY")) from error


# --- places


def cache_at(place: str) -> SQLiteCache | RedisCache:
    """Return the cache at *place*, a path or an address."""
    return RedisCache(place, timeout=_STEP_TIMEOUT) if is_address(place) else SQLiteCache(_path(place))


def spool_at(place: str, *, max_alone: int) -> Spool:
    """Return the spool at *place*, a path or an address; see `Spool` for *max_alone*."""
    if is_address(place):
        return RedisSpool(place, max_alone=max_alone)
    return SQLiteSpool(_path(place), max_alone=max_alone)


def _path(place: str) -> str:
    if is_nearly_address(place) and not Path(place).exists():
        raise UsageError(
            f"{place!r} looks like the address of a server: write redis://HOST:PORT/DB, or ./{place} for a file"
        )
    return place


def check_spool(place: str) -> None:
    """Raise `UsageError` if there is no spool at *place*, which would be made there otherwise; an address is not looked at."""
    if not is_address(place) and not Path(place).exists():
        raise UsageError(f"there is no spool {place!r}; microbatch spool {place} --put INPUT.jsonl makes one")


# --- what is asked


def read_questions(args: argparse.Namespace, *, needs_model: bool) -> Questions:
    """Return what makes requests from the lines of the input; *needs_model* refuses lines that name no model."""
    options: dict[str, Any] = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    if args.param:
        options["params"] = _read_params(args)
    if args.template is None:
        for name in ("system", "labels", "schema", "examples", "on_empty"):
            if getattr(args, name) is not None:
                raise UsageError(
                    f"{flag(name)} needs a --template; lines without one are OpenAI Batch requests, which hold all of it"
                )
        return BatchLines(options=options, needs_model=needs_model, id_field=args.id_field)
    if needs_model:
        raise UsageError("no model: give --model NAME, or --simulate to try without one")
    questions = Templated(
        read_text(args.template, "--template"),
        escapes=not args.template.startswith("@") or args.template.startswith("@@"),
        labels=None if args.labels is None else read_labels(args.labels),
        schema=None if args.schema is None else read_schema(args.schema),
        system=None if args.system is None else read_text(args.system, "--system"),
        options=options,
    )
    if args.examples is not None:
        questions.examples = read_examples(args.examples, questions)
    return questions


def _read_params(args: argparse.Namespace) -> dict[str, Any]:
    """Return the request parameters of `--param`."""
    params = read_pairs("--param", args.param)
    for name in ("max_tokens", "max_completion_tokens", "temperature", "model"):
        if name in params:
            instead = "--max-tokens" if name == "max_completion_tokens" else flag(name)
            raise UsageError(f"--param {name}: use {instead}")
    if "response_format" in params and (args.labels is not None or args.schema is not None):
        raise UsageError("--param response_format: --labels and --schema say which form answers have")
    try:
        payload_of(Request([{"role": "user", "content": "any"}], params=params), None)
    except ConfigError as error:
        message = (
            str(error)
            .removeprefix("params: ")
            .replace("submit() has an argument for this or decides", "the command decides")
        )
        raise UsageError(f"--param: {message}") from error
    return dict(sorted(params.items()))


def read_text(value: str, name: str) -> str:
    """Return the text of the flag *name*: *value*, or the content of the file that `@FILE` names; `@@` stands for an @."""
    if not value.startswith("@"):
        return value
    if value.startswith("@@"):
        return value[1:]
    try:
        return Path(value[1:]).read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        hint = f" (a text that begins with @ is written {name} '@@...')"
        raise UsageError(f"{name}: cannot read {value[1:]!r}: {reason}{hint}") from None


def read_labels(value: str) -> list[str]:
    """Return the labels of `--labels a,b,c` or `--labels @FILE` (one per line, or a JSON list)."""
    text = read_text(value, "--labels")
    if not value.startswith("@"):
        labels = [label.strip() for label in text.split(",")]
    else:
        try:
            listed = msgspec.json.decode(text, type=list[str])
        except ValueError:
            listed = text.splitlines()
        labels = [label.strip() for label in listed if label.strip()]
    if not all(labels) or not labels:
        raise UsageError(f"--labels {value!r}: a label is empty; write --labels electronics,clothing,other")
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"--labels: {label!r} occurs twice")
    return labels


def read_schema(path: str) -> dict[str, Any]:
    """Return the `response_format` of the file of `--schema`, which holds a JSON Schema or a whole response_format."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"--schema: cannot read {path!r}: {error.strerror}") from None
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--schema: {path!r} must hold a JSON Schema, an object: {error}") from None
    if value.get("type") != "json_schema":
        value = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": value}}
    try:
        payload_of(Request([{"role": "user", "content": "any"}], params={"response_format": value}), None)
    except ConfigError as error:
        raise UsageError(f"--schema {path}: {error}") from error
    return value
