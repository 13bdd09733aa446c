"""`microbatch simulate [options]`: serve a simulated OpenAI-compatible endpoint.

Serve a simulated OpenAI-compatible endpoint (POST /v1/chat/completions and
/v1/embeddings, GET /v1/models, and OpenAI's files and batches below /v1/files
and /v1/batches). It makes up answers that keep to the schema asked for, and
vectors that are near where texts share words, counts tokens as OpenAI does,
takes its time as a model does, and can be told to keep to a quota, to lack
features or to go wrong. Any key and any model name will do.

Examples:
  microbatch simulate --port 8000
  microbatch simulate --first-token 0 --tokens-per-second 0       (no delay)
  microbatch simulate --json-schema 400 --no-streaming         (a modest server)
  microbatch simulate --rpm 500 --tpm 200000            (429 beyond these)
  microbatch simulate --fault truncated --fault http_429 --fault-rate 0.1
  microbatch simulate --mistakes 16=0.1 --noise 0.02    (wrong in large batches)
  microbatch simulate --batch-seconds 60 --batch-expires 20%   (/v1/batches)
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Final, get_args

from microbatch.cli import console
from microbatch.cli.arguments import Group, add_flag, number
from microbatch.cli.console import note, plural, report
from microbatch.cli.stopping import Server, listening
from microbatch.gateway.place import Place
from microbatch.testing.endpoint import SimulatedEndpoint
from microbatch.testing.faults import ElementKind, Faults, On, TextKind, WireKind
from microbatch.testing.mistakes import Mistakes
from microbatch.testing.model import Accepts, Fails, MaxTokensName, StreamOptions
from microbatch.testing.pace import Latency
from microbatch.testing.quota import Quota

_KINDS: Final = [kind for kinds in (ElementKind, TextKind, WireKind) for kind in get_args(kinds)]

_SAME_NAMES: Final = (
    *("host", "port", "batch_seconds", "batch_expires", "batch_tokens", "context_tokens", "max_output_tokens"),
    *("reasoning_tokens", "indent", "json_schema", "json_object", "max_tokens_name", "temperature_fixed"),
    *("stream_options", "cached_prefixes", "obey", "brief"),
)
"""Flags that are arguments of `SimulatedEndpoint`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `simulate`."""
    add_flag(parser, "--host ADDRESS", "address to listen on", default="127.0.0.1")
    add_flag(parser, "--port N", "port to listen on, 0 for a free one", least=0, most=65_535, default=0)
    add_flag(parser, "--api-key KEY", "a key that is accepted; may be repeated (default: any key is)", action="append")
    latency = parser.add_argument_group("latency")
    add_flag(latency, "--first-token SECONDS", "time to the first token", default=0.5)
    add_flag(latency, "--tokens-per-second RATE", "rate after that, 0 for no delay", least=0, default=80.0)
    quota = parser.add_argument_group("quota, for each key and model")
    tokens = "at most N tokens within any 60 seconds, those of a prompt and its max_tokens (default: no limit)"
    add_flag(quota, "--rpm N", "at most N requests within any 60 seconds (default: no limit)")
    add_flag(quota, "--tpm N", tokens)
    _add_batches(parser.add_argument_group("batches"))
    _add_capabilities(parser.add_argument_group("what the model can do"))
    _add_faults(parser.add_argument_group("what goes wrong"))


def _add_batches(group: Group) -> None:
    add_flag(group, "--batch-seconds SECONDS", "how long a batch takes", default=10.0)
    expires = "lines of a batch that are not answered before its time is over, as a number or a percentage"
    add_flag(group, "--batch-expires N|P%", expires, type=_lines_or_share, default=0)
    tokens = "at most N tokens in the batches of one key that are worked on (default: no limit)"
    add_flag(group, "--batch-tokens N", tokens)


def _lines_or_share(text: str) -> float:
    """Return a number of lines as a whole number, and a percentage as a share."""
    share = text.endswith("%")
    read: float = number(0, 100)(text.removesuffix("%")) / 100 if share else number(0, kind=int)(text)
    return read


def _add_capabilities(group: Group) -> None:
    add_flag(group, "--context-tokens N", "at most N tokens of prompt and reply together")
    add_flag(group, "--max-output-tokens N", "at most N tokens of a reply; a higher max_tokens is refused")
    add_flag(
        group, "--reasoning-tokens N", "tokens that the model thinks, unseen, before it answers", least=0, default=0
    )
    add_flag(group, "--indent N", "write JSON on many lines, indented by N", least=0)
    for name, choices, what in (
        ("--json-schema", Fails, "response_format json_schema"),
        ("--json-object", Accepts, "response_format json_object"),
        ("--stream-options", StreamOptions, "stream_options"),
    ):
        group.add_argument(name, choices=get_args(choices), default="ok", help=f"how {what} is treated (default: ok)")
    names = get_args(MaxTokensName)
    only = f"the only name of that limit: {' or '.join(names)} (default: both)"
    add_flag(group, "--max-tokens-name NAME", only, choices=names)
    add_flag(group, "--temperature-fixed", "refuse any temperature but 1, as reasoning models do")
    add_flag(group, "--no-streaming", "refuse streaming")
    add_flag(group, "--cached-prefixes", "report cached_tokens as OpenAI does")
    add_flag(group, "--brief", "answer in few words where max_tokens is low, instead of being cut there")
    order = '"answer X for all requests" makes X every answer of a combined reply'
    add_flag(group, "--obey", f"let one item give orders to all: {order}")


def _add_faults(group: Group) -> None:
    kinds = f"what may go wrong, may be repeated: {', '.join(_KINDS)}"
    add_flag(group, "--fault KIND", kinds, action="append", choices=_KINDS, default=[])
    add_flag(group, "--fault-rate R", "share of the replies that go wrong", least=0, most=1, default=0.2)
    group.add_argument(
        "--fault-on", choices=get_args(On), default="all", help="which calls may go wrong (default: all)"
    )
    wrong = "share of the items answered wrong in prompts of at least SIZE items, as 16=0.1; may be repeated"
    add_flag(group, "--mistakes SIZE=SHARE", wrong, action="append", type=_mistakes, default=[])
    noise = "share of the items that are answered right or wrong by a coin, alone or not"
    add_flag(group, "--noise SHARE", noise, least=0, most=1, default=0.0)
    add_flag(group, "--seed N", "another seed makes other choices", type=int, default=0)


def _mistakes(text: str) -> tuple[int, float]:
    """Return the size and the share of `--mistakes`."""
    size, given, share = text.partition("=")
    if not given:
        raise argparse.ArgumentTypeError(f"must be SIZE=SHARE, as 16=0.1, got {text!r}")
    return number(1, kind=int)(size), number(0, 1)(share)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes, and return the exit status."""
    faults = Faults(args.fault, rate=args.fault_rate, on=args.fault_on, seed=args.seed) if args.fault else None
    wrong = args.mistakes or args.noise
    endpoint = SimulatedEndpoint(
        api_keys=args.api_key,
        latency=Latency(first_token=args.first_token, tokens_per_second=args.tokens_per_second),
        faults=faults,
        mistakes=Mistakes(by_size=dict(args.mistakes), noise=args.noise, seed=args.seed) if wrong else None,
        quota=Quota(rpm=args.rpm, tpm=args.tpm) if args.rpm or args.tpm else None,
        stream_supported=not args.no_streaming,
        **{name: getattr(args, name) for name in _SAME_NAMES},
    )
    return asyncio.run(_serve(args, endpoint))


async def _serve(args: argparse.Namespace, endpoint: SimulatedEndpoint) -> int:
    place = Place(host=args.host, port=args.port)
    async with listening(Server(str(place), place.remedy, endpoint.open, endpoint.aclose)) as stopped:
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
