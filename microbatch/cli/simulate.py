"""`microbatch simulate`: serve a simulated OpenAI-compatible endpoint.

Serve a simulated OpenAI-compatible endpoint (POST /v1/chat/completions, GET
/v1/models, and OpenAI's files and batches below /v1/files and /v1/batches). It
makes up answers that keep to the schema asked for and counts tokens as OpenAI
does, takes its time as a model does, and can be told to keep to a quota, to
lack features or to go wrong. Any key and any model name will do.

Examples:
  microbatch simulate --port 8000
  microbatch simulate --first-token 0 --tokens-per-second 0       (no delay)
  microbatch simulate --json-schema 400 --no-streaming         (a modest server)
  microbatch simulate --rpm 500 --tpm 200000            (429 beyond these)
  microbatch simulate --fault truncated --fault http_429 --fault-rate 0.1
  microbatch simulate --batch-seconds 60 --batch-expires 20%   (/v1/batches)
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, get_args

from microbatch.cli import console
from microbatch.cli.arguments import add_count, add_option, add_seconds, add_switch, number, whole_number
from microbatch.cli.console import note, plural, report
from microbatch.cli.stopping import listening
from microbatch.testing.endpoint import SimulatedEndpoint
from microbatch.testing.faults import ElementKind, Faults, On, TextKind, WireKind
from microbatch.testing.model import Accepts, Fails, MaxTokensName, StreamOptions
from microbatch.testing.pace import Latency
from microbatch.testing.quota import Quota

if TYPE_CHECKING:
    import argparse

USAGE = "microbatch simulate [options]"

_KINDS: Final = [kind for kinds in (ElementKind, TextKind, WireKind) for kind in get_args(kinds)]


_SAME_NAMES: Final = (
    *("host", "port", "batch_seconds", "batch_expires", "batch_tokens", "context_tokens", "max_output_tokens"),
    *("reasoning_tokens", "indent", "json_schema", "json_object", "max_tokens_name", "temperature_fixed"),
    *("stream_options", "cached_prefixes", "obey"),
)
"""Flags that are arguments of `SimulatedEndpoint`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `simulate`."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    port = "port to listen on (default: a free one)"
    add_option(parser, "--port", "N", port, type=whole_number(0, 65_535), default=0)
    key = "a key that is accepted; may be repeated (default: any key is)"
    add_option(parser, "--api-key", "KEY", key, action="append")
    latency = parser.add_argument_group("latency")
    add_seconds(latency, "--first-token", "time to the first token", default=0.5)
    rate = "rate after that, 0 for no delay (default: 80)"
    add_option(latency, "--tokens-per-second", "N", rate, type=number(0), default=80.0)
    quota = parser.add_argument_group("quota, for each key and model")
    add_count(quota, "--rpm", "at most N requests within any 60 seconds (default: no limit)")
    add_count(
        quota,
        "--tpm",
        "at most N tokens within any 60 seconds, those of a prompt and its max_tokens (default: no limit)",
    )
    _add_batches(parser.add_argument_group("batches"))
    _add_capabilities(parser.add_argument_group("what the model can do"))
    _add_faults(parser.add_argument_group("what goes wrong"))


def _add_batches(group: argparse._ArgumentGroup) -> None:
    add_seconds(group, "--batch-seconds", "how long a batch takes", default=10.0)
    expires = "lines of a batch that are not answered before its time is over, as a number or a percentage (default: 0)"
    add_option(group, "--batch-expires", "N|P%", expires, type=_lines_or_share, default=0)
    tokens = "at most N tokens in the batches of one key that are worked on (default: no limit)"
    add_count(group, "--batch-tokens", tokens)


def _lines_or_share(text: str) -> float:
    """Return a number of lines as a whole number, and a percentage as a share."""
    if text.endswith("%"):
        share: float = number(0, 100)(text.removesuffix("%"))
        return share / 100
    lines: int = whole_number(0)(text)
    return lines


def _add_capabilities(group: argparse._ArgumentGroup) -> None:
    add_count(group, "--context-tokens", "at most N tokens of prompt and reply together")
    add_count(group, "--max-output-tokens", "at most N tokens of a reply; a higher max_tokens is refused")
    reasoning = "tokens that the model thinks, unseen, before it answers"
    add_count(group, "--reasoning-tokens", reasoning, least=0, default=0)
    add_count(group, "--indent", "write JSON on many lines, indented by N", least=0)
    for name, choices, what in (
        ("--json-schema", Fails, "response_format json_schema"),
        ("--json-object", Accepts, "response_format json_object"),
        ("--stream-options", StreamOptions, "stream_options"),
    ):
        group.add_argument(name, choices=get_args(choices), default="ok", help=f"how {what} is treated (default: ok)")
    names = get_args(MaxTokensName)
    add_option(
        group,
        "--max-tokens-name",
        "NAME",
        f"the only name of that limit: {' or '.join(names)} (default: both)",
        choices=names,
    )
    add_switch(group, "--temperature-fixed", "refuse any temperature but 1, as reasoning models do")
    add_switch(group, "--no-streaming", "refuse streaming")
    add_switch(group, "--cached-prefixes", "report cached_tokens as OpenAI does")
    order = '"answer X for all requests" makes X every answer of a combined reply'
    add_switch(group, "--obey", f"let one item give orders to all: {order}")


def _add_faults(group: argparse._ArgumentGroup) -> None:
    kinds = f"what may go wrong, may be repeated: {', '.join(_KINDS)}"
    add_option(group, "--fault", "KIND", kinds, action="append", choices=_KINDS, default=[])
    rate = "share of the replies that go wrong (default: 0.2)"
    add_option(group, "--fault-rate", "R", rate, type=number(0, 1), default=0.2)
    calls = "which calls may go wrong (default: all)"
    group.add_argument("--fault-on", choices=get_args(On), default="all", help=calls)
    add_option(group, "--seed", "N", "another seed makes other choices (default: 0)", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes, and return the exit status."""
    return asyncio.run(_serve(args))


def _make_endpoint(args: argparse.Namespace) -> SimulatedEndpoint:
    faults = None
    if args.fault:
        faults = Faults(args.fault, rate=args.fault_rate, on=args.fault_on, seed=args.seed)
    return SimulatedEndpoint(
        api_keys=args.api_key,
        latency=Latency(first_token=args.first_token, tokens_per_second=args.tokens_per_second),
        faults=faults,
        quota=Quota(rpm=args.rpm, tpm=args.tpm) if args.rpm or args.tpm else None,
        stream_supported=not args.no_streaming,
        **{name: getattr(args, name) for name in _SAME_NAMES},
    )


async def _serve(args: argparse.Namespace) -> int:
    endpoint = _make_endpoint(args)
    async with listening(args, endpoint.open, endpoint.aclose) as stopped:
        report(endpoint.base_url)
        note("A simulated endpoint listens there; any key and model name will do. Ctrl-C ends it. For example:")
        note(f"  microbatch run INPUT.jsonl -o OUTPUT.jsonl --base-url {endpoint.base_url} --model gpt-4.1-mini ...")
        await stopped.wait()
    note(_summary(endpoint))
    return console.OK


def _summary(endpoint: SimulatedEndpoint) -> str:
    tokens = f"{endpoint.prompt_tokens:,} prompt and {endpoint.completion_tokens:,} completion tokens"
    faulted = f", {endpoint.faulted:,} spoiled on purpose" if endpoint.faults else ""
    refused = f", {endpoint.quota_refusals:,} refused for the quota" if endpoint.quota else ""
    jobs = plural(endpoint.batches_created, "batch job")
    batched = f", {plural(endpoint.batch_lines, 'line')} of {jobs}" if endpoint.batches_created else ""
    return (
        f"served {plural(endpoint.calls, 'call')}{batched}{faulted}{refused}: "
        f"{plural(endpoint.combined_calls, 'combined prompt')} and {plural(endpoint.single_calls, 'single call')} "
        f"with {plural(endpoint.items, 'item')}, {tokens}"
    )
