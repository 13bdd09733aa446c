r"""`microbatch serve --upstream URL [options]`: serve the gateway, which combines the requests of any OpenAI client.

Serve an OpenAI-compatible API in front of another. Chat completions of many
clients leave as combined prompts, and each client gets its own answer, as JSON
or as a stream; texts to embed leave as lists. Everything else under /v1 is
relayed as it is. Clients change nothing but their base URL, and use their own keys: requests with different keys
never share a prompt, a call or a cached answer. Azure's clients take the
gateway as their azure_endpoint, whatever the upstream is.

With OPENAI_API_KEY set, or the variable of --api-key-env, clients without a key
(or with the key "microbatch") use that one, for chat completions, embeddings
and the list of models only; off loopback this needs --access-token-file.

Clients may send X-Microbatch-Priority: high|normal|low, X-Microbatch-Cache: no
or refresh, X-Microbatch-Batch: no (relayed byte for byte), and
X-Microbatch-Tenant: NAME (requests of different tenants are never combined).

With --audit some of what was answered in batches is asked again alone, to
measure what combining does to the answers; /stats and /dashboard show it, and
batches become smaller where it does harm. The gateway's own key pays for that:
requests with a key of the client's are audited only with --audit-own-keys.

Beside the API there are /healthz, /readyz, /stats, /metrics and /dashboard, and
with --access-log a line of JSON for each request. On Ctrl-C or SIGTERM no more
requests are taken, and those under way are answered; a second signal stops at
once. Every flag can be given as an environment variable too, --max-wait as
MICROBATCH_MAX_WAIT; a flag takes precedence.

Examples:
  microbatch serve --upstream https://api.openai.com/v1 --port 8080
  microbatch serve --upstream http://localhost:8000/v1 --max-wait 0.05 --rpm 500
  microbatch serve --upstream https://NAME.openai.azure.com
  microbatch serve --upstream https://api.openai.com/v1 --host 0.0.0.0 \
      --access-token-file token.txt --cache redis://localhost:6379/0
"""

from __future__ import annotations

import asyncio
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from microbatch.cli import arguments, console
from microbatch.cli.arguments import add_flag, flag, read_settings
from microbatch.cli.console import UsageError, note, plural, report
from microbatch.cli.environment import with_environment
from microbatch.cli.logs import call_logs, logging_to
from microbatch.cli.plan import cache_at, read_policy, read_rate_limit
from microbatch.cli.prices import read_prices
from microbatch.cli.semantic import add_semantic_cache, semantic_cache
from microbatch.cli.stopping import listening
from microbatch.errors import ConfigError
from microbatch.gateway.access import is_loopback
from microbatch.gateway.access_log import STDOUT
from microbatch.gateway.errors import in_flags
from microbatch.gateway.server import Gateway
from microbatch.gateway.settings import GatewaySettings
from microbatch.gateway.upstream import lacks_version
from microbatch.policy import FallbackPolicy
from microbatch.transports.credentials import is_credential, is_for_a_proxy

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_LEAST_SECRET_BYTES: Final = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    parser.set_defaults(parser=parser)
    add_flag(parser, "--upstream URL", "address of the API to serve, up to /v1")
    add_flag(parser, "--host ADDRESS", "address to listen on", default="127.0.0.1")
    add_flag(parser, "--port N", "port, 0 for a free one", least=0, most=65_535, default=8080)
    add_flag(parser, "--model NAME", "the model for requests that name none (default: refuse these)")
    arguments.add_connection(parser.add_argument_group("upstream"), "OPENAI_API_KEY")
    add_flag(parser, "--grace SECONDS", "time to answer what is under way after a signal", default=30.0)
    arguments.add_rate_limits(parser)
    arguments.add_cache(parser)
    add_semantic_cache(parser)
    arguments.add_prices(parser)
    _add_access_log(parser)
    _add_access(parser.add_argument_group("access"))
    arguments.add_settings(parser.add_argument_group("limits"), GatewaySettings, also={"upstream_timeout": "--timeout"})
    arguments.add_log_file(parser)
    batching = parser.add_argument_group("batching")
    arguments.add_policy(batching)
    arguments.add_audit(batching)
    own = "audit requests with a client's own key too, at that client's expense"
    add_flag(batching, "--audit-own-keys", own)
    arguments.add_budget(parser.add_argument_group("budget"))


_NO_LOG: Final = "none"


def _add_access_log(group: arguments.Group) -> None:
    log = (
        "add a line of JSON for each request to FILE, - for standard output: ids, status, reason, time, route, model, digest of the "
        "caller, tokens and dollars, and never texts or keys"
    )
    add_flag(group, "--access-log FILE|-|none", f"{log} (default: none on loopback, else -)")


def _read_access_log(args: argparse.Namespace) -> str | None:
    if args.access_log is None:
        return None if is_loopback(args.host) else STDOUT
    path: str = args.access_log
    return None if path == _NO_LOG else path


def _add_access(group: arguments.Group) -> None:
    add_flag(group, "--no-own-key", "clients without a key go without one, whatever the environment has")
    access = "holds the token that clients give in place of a key to use the gateway's, and off loopback to see /stats"
    add_flag(group, "--access-token-file FILE", access)
    key = "holds the key of the digests that tell tenants apart (default: the cache's own secret, else a random one)"
    add_flag(group, "--secret-file FILE", key)
    header = "a header that goes with combined requests and must be equal in them; may be repeated"
    add_flag(group, "--lane-header NAME", header, action="append", default=[])
    host = "a further name under which clients address the gateway, * for any; may be repeated"
    add_flag(group, "--allowed-host NAME", host, action="append", default=[])


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes, and return the exit status."""
    words = list(args.argv[args.argv.index(args.name) + 1 :])
    found = with_environment(args.parser, words, os.environ)
    found.argv = args.argv
    # The flag has been heeded already.
    with logging_to(found) if args.log_file is None else nullcontext():
        return asyncio.run(_serve(found))


def make_gateway(args: argparse.Namespace) -> Gateway:
    """Return the gateway of the flags, not open. Raise `UsageError` if a setting is wrong."""
    if not args.upstream:
        raise UsageError("no upstream: give --upstream URL, the address of the API to serve")
    settings = read_settings(args, GatewaySettings)
    policy = read_policy(args)
    token = _read_secret(args, "access_token_file", least=1)
    own_key = _own_key(args)
    exact = None if args.cache is None else cache_at(args.cache)
    try:
        return Gateway(
            args.upstream,
            host=args.host,
            port=args.port,
            model=args.model,
            api_key=own_key,
            **_read_connection(args),
            access_token=None if token is None else token.decode("utf-8", "replace"),
            secret=_read_secret(args, "secret_file", least=_LEAST_SECRET_BYTES),
            lane_headers=args.lane_header,
            allowed_hosts=args.allowed_host,
            access_log=_read_access_log(args),
            settings=settings,
            policy=policy,
            fallback=FallbackPolicy(canary=args.canary),
            rate_limit=read_rate_limit(args),
            cache=semantic_cache(args, exact) or exact,
            audit=arguments.read_audit(args, audit_own_keys=args.audit_own_keys),
            budget=arguments.read_budget(args),
            prices=read_prices(args),
            hooks=call_logs(),
        )
    except ConfigError as error:
        message = in_flags(arguments.with_flags(str(error), arguments.CONNECTION))
        raise UsageError(message.replace("api_key", args.api_key_env or "OPENAI_API_KEY")) from error


def _read_connection(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments `query` and `connection` of `Gateway`."""
    connection = arguments.read_connection(args)
    for name in connection["headers"]:
        if is_credential(name) and not is_for_a_proxy(name):
            raise UsageError(
                f"--header {name}: clients of the gateway would use it without being asked for a token; give the gateway's key as "
                "OPENAI_API_KEY, or by --api-key-env or --api-key-command"
            )
    return {"query": connection.pop("query"), "connection": connection}


def _own_key(args: argparse.Namespace) -> str | Callable[[], str] | None:
    if args.no_own_key:
        return None
    return arguments.read_key(args) or os.environ.get("OPENAI_API_KEY") or None


def _name_of_key(args: argparse.Namespace) -> str:
    return "the key of --api-key-command" if args.api_key_command else args.api_key_env or "OPENAI_API_KEY"


def _read_secret(args: argparse.Namespace, name: str, *, least: int) -> bytes | None:
    """Return the content of a file, of at least *least* bytes; None if its flag is not given."""
    path = getattr(args, name)
    if path is None:
        return None
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise UsageError(f"{flag(name)} {path}: {error.strerror}") from None
    if len(secret) < least:
        raise UsageError(f"{flag(name)} {path}: must hold at least {plural(least, 'byte')}, and holds {len(secret)}")
    return secret


async def _serve(args: argparse.Namespace) -> int:
    gateway = make_gateway(args)
    async with listening(args, gateway.open, lambda: gateway.aclose(args.grace)) as stopped:
        report(gateway.base_url)
        note(f"The gateway to {args.upstream} listens there. Ctrl-C ends it.")
        if lacks_version(args.upstream):
            note("--upstream has no version in its path: most APIs are at an address that ends in /v1.")
        if not args.no_own_key and (args.api_key_command or args.api_key_env or os.environ.get("OPENAI_API_KEY")):
            clients = "with the access token" if args.access_token_file else "without a key"
            note(
                f"Clients {clients} use {_name_of_key(args)}, for chat completions, embeddings and the list of models."
            )
        await stopped.wait()
        note(f"Stopping: requests under way are answered, for up to {args.grace:g} s.")
    note(_summary(gateway))
    return console.OK


def _summary(gateway: Gateway) -> str:
    stats = gateway.stats()
    asked = plural(max(0, stats.items - gateway.texts), "chat completion")
    if gateway.texts:
        asked = f"{asked} and {plural(gateway.texts, 'text')} to embed"
    combined = f"{asked} with {plural(stats.upstream_calls - stats.forwarded, 'call')}"
    failed = f", {stats.failed:,} failed" if stats.failed else ""
    return f"served {combined}{failed}, and relayed {plural(stats.forwarded, 'request')}"
