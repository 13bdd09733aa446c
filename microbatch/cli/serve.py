"""`microbatch serve`: the gateway, an OpenAI-compatible server that combines the requests of its clients."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from microbatch.cli import console
from microbatch.cli.arguments import (
    add_cache,
    add_policy,
    add_rate_limits,
    add_seconds,
    add_settings,
    read_settings,
    whole_number,
)
from microbatch.cli.console import UsageError, note, plural, report
from microbatch.cli.environment import with_environment
from microbatch.cli.plan import cache_at, read_policy, read_rate_limit
from microbatch.cli.stopping import listening
from microbatch.errors import ConfigError
from microbatch.gateway.server import Gateway
from microbatch.gateway.settings import GatewaySettings
from microbatch.policy import FallbackPolicy

if TYPE_CHECKING:
    import argparse

USAGE = "microbatch serve --upstream URL [options]"
HELP = "serve the gateway, which combines the requests of any OpenAI client"
DESCRIPTION = """\
Serve an OpenAI-compatible API in front of another. Chat completions of many
clients leave as combined prompts, and each client gets its own answer, as JSON
or as a stream; everything else under /v1 is relayed as it is. Clients change
nothing but their base URL, and use their own keys: requests with different keys
never share a prompt, a call or a cached answer.

With OPENAI_API_KEY set, clients without a key (or with the key "microbatch")
use that one, for chat completions and the list of models only; off loopback
this needs --access-token-file.

Clients may send X-Microbatch-Priority: high|normal|low, X-Microbatch-Cache: no,
X-Microbatch-Batch: no (relayed byte for byte), and X-Microbatch-Tenant: NAME
(requests of different tenants are never combined).

Beside the API there are /healthz, /readyz and /stats. On Ctrl-C or SIGTERM no
more requests are taken, and those under way are answered; a second signal stops
at once. Every flag can be given as an environment variable too, --max-wait as
MICROBATCH_MAX_WAIT; a flag takes precedence.
"""
EXAMPLES = """
examples:
  microbatch serve --upstream https://api.openai.com/v1 --port 8080
  microbatch serve --upstream http://localhost:8000/v1 --max-wait 0.05 --rpm 500
  microbatch serve --upstream https://api.openai.com/v1 --host 0.0.0.0 \\
      --access-token-file token.txt --cache redis://localhost:6379/0
"""

PORT: Final = 8080
GRACE: Final = 30.0
_LEAST_SECRET: Final = 16
"""Bytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    parser.set_defaults(parser=parser)
    parser.add_argument("--upstream", metavar="URL", help="address of the API to serve, up to /v1")
    parser.add_argument(
        "--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    port = f"port, 0 for a free one (default: {PORT})"
    parser.add_argument("--port", metavar="N", type=whole_number(0, 65_535), default=PORT, help=port)
    parser.add_argument("--model", metavar="NAME", help="the model for requests that name none (default: refuse these)")
    add_seconds(parser, "--grace", "time to answer what is under way after a signal", default=GRACE)
    add_rate_limits(parser)
    add_cache(parser)
    _add_access(parser.add_argument_group("access"))
    add_settings(parser.add_argument_group("limits"), GatewaySettings)
    add_policy(parser.add_argument_group("batching"))


def _add_access(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--no-own-key", action="store_true", help="ignore OPENAI_API_KEY: clients without a key go without one"
    )
    group.add_argument(
        "--access-token-file",
        metavar="FILE",
        help="holds the token that clients give in place of a key to use the gateway's, and off loopback to see /stats",
    )
    group.add_argument(
        "--secret-file",
        metavar="FILE",
        help="holds the key of the digests that tell tenants apart (default: the cache's own secret, else a random one)",
    )
    group.add_argument(
        "--lane-header",
        metavar="NAME",
        action="append",
        default=[],
        help="a header that goes with combined requests and must be equal in them; may be repeated",
    )
    group.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a further name under which clients address the gateway, * for any; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes, and return the exit status.

    Raises:
        UsageError: A setting is wrong, or the gateway cannot listen on the address.
    """
    words = list(args.argv[args.argv.index(args.name) + 1 :])
    return asyncio.run(_serve(with_environment(args.parser, words, os.environ)))


def make_gateway(args: argparse.Namespace) -> Gateway:
    """Return the gateway of the flags, not open.

    Raises:
        UsageError: A setting is wrong.
    """
    if not args.upstream:
        raise UsageError("no upstream: give --upstream URL, the address of the API to serve")
    settings = read_settings(args, GatewaySettings)
    policy = read_policy(args)
    try:
        return Gateway(
            args.upstream,
            host=args.host,
            port=args.port,
            model=args.model,
            api_key=_own_key(args),
            access_token=_token(args.access_token_file),
            secret=_secret(args.secret_file),
            lane_headers=args.lane_header,
            allowed_hosts=args.allowed_host,
            settings=settings,
            policy=policy,
            fallback=FallbackPolicy(canary=args.canary),
            rate_limit=read_rate_limit(args),
            cache=None if args.cache is None else cache_at(args.cache),
        )
    except ConfigError as error:
        raise UsageError(str(error).replace("base_url", "--upstream").replace("api_key", "OPENAI_API_KEY")) from error


def _own_key(args: argparse.Namespace) -> str | None:
    return None if args.no_own_key else os.environ.get("OPENAI_API_KEY") or None


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes().strip()
    except OSError as error:
        raise UsageError(f"{name} {path}: {error.strerror}") from None


def _token(path: str | None) -> str | None:
    if path is None:
        return None
    token = _read(path, "--access-token-file").decode("utf-8", "replace")
    if not token:
        raise UsageError(f"--access-token-file {path}: the file is empty")
    return token


def _secret(path: str | None) -> bytes | None:
    if path is None:
        return None
    secret = _read(path, "--secret-file")
    if len(secret) < _LEAST_SECRET:
        raise UsageError(f"--secret-file {path}: a secret has at least {_LEAST_SECRET} bytes")
    return secret


async def _serve(args: argparse.Namespace) -> int:
    gateway = make_gateway(args)
    async with listening(gateway, args, lambda: gateway.aclose(args.grace)) as stopped:
        report(gateway.base_url)
        note(f"The gateway to {args.upstream} listens there. Ctrl-C ends it.")
        if _own_key(args):
            clients = "with the access token" if args.access_token_file else "without a key"
            note(f"Clients {clients} use OPENAI_API_KEY, for chat completions and the list of models.")
        await stopped.wait()
        note(f"Stopping: requests under way are answered, for up to {args.grace:g} s.")
    note(_summary(gateway))
    return console.OK


def _summary(gateway: Gateway) -> str:
    stats = gateway.stats()
    combined = f"{plural(stats.items, 'chat completion')} with {plural(stats.upstream_calls - stats.forwarded, 'call')}"
    failed = f", {stats.failed:,} failed" if stats.failed else ""
    return f"served {combined}{failed}, and relayed {plural(stats.forwarded, 'request')}"
