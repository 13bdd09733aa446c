r"""`microbatch serve --upstream URL [options]`: serve the gateway, which combines the requests of any OpenAI client.

Serve an OpenAI-compatible API in front of another. Chat completions of many
clients leave as combined prompts, and each client gets its own answer, as JSON
or as a stream; texts to embed leave as lists. Everything else under /v1 is
relayed as it is. Clients change nothing but their base URL, and use their own
keys: requests with different keys never share a prompt, a call or a cached
answer. Azure's clients take the gateway as their azure_endpoint, whatever the
upstream is.

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
once. On SIGHUP the key command is run again, and the files of --prices,
--access-token-file, --tls-cert and --tls-key are read again; log files that
were renamed are made anew. With --workers N there are N processes behind one
port; on SIGHUP they are replaced one after the other, and no request is lost.

Every flag can be given as an environment variable too, --max-wait as
MICROBATCH_MAX_WAIT; a flag takes precedence.

Examples:
  microbatch serve --upstream https://api.openai.com/v1 --port 8080
  microbatch serve --upstream http://localhost:8000/v1 --max-wait 0.05 --rpm 500
  microbatch serve --upstream https://NAME.openai.azure.com
  microbatch serve --upstream https://api.openai.com/v1 --uds /run/llm.sock \
      --workers 4 --access-log /var/log/llm.jsonl
  microbatch serve --upstream https://api.openai.com/v1 --host 0.0.0.0 \
      --access-token-file token.txt --cache redis://localhost:6379/0
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import socket
from contextlib import nullcontext
from functools import partial
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
from microbatch.cli.stopping import Server, listening
from microbatch.cli.workers.supervisor import Supervisor
from microbatch.cli.workers.work import Work, sockets_of_worker
from microbatch.errors import ConfigError
from microbatch.gateway.access import is_loopback
from microbatch.gateway.access_log import STDOUT, check_log
from microbatch.gateway.errors import in_flags
from microbatch.gateway.place import Place
from microbatch.gateway.server import Gateway
from microbatch.gateway.settings import GatewaySettings
from microbatch.gateway.upstream import lacks_version
from microbatch.policy import FallbackPolicy
from microbatch.transports.credentials import is_credential, is_for_a_proxy

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.gateway.report import Report


_LEAST_SECRET_BYTES: Final = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    parser.set_defaults(parser=parser)
    _add_listening(parser.add_argument_group("where clients connect"))
    upstream = parser.add_argument_group("upstream")
    add_flag(upstream, "--upstream URL", "address of the API to serve, up to /v1")
    add_flag(upstream, "--model NAME", "the model for requests that name none (default: refuse these)")
    arguments.add_connection(upstream, "OPENAI_API_KEY", uds="--upstream-uds")
    arguments.add_rate_limits(upstream)
    _add_access(parser.add_argument_group("access"))
    arguments.add_settings(parser.add_argument_group("limits"), GatewaySettings, also={"upstream_timeout": "--timeout"})
    operation = parser.add_argument_group("operation")
    workers = (
        "serve with N processes behind one port; a worker that ends is replaced, and a limit in this process is divided"
    )
    add_flag(operation, "--workers N", workers, default=1)
    add_flag(operation, "--grace SECONDS", "time to answer what is under way after a signal", default=30.0)
    _add_access_log(operation)
    arguments.add_log_file(operation)
    arguments.add_cache(operation)
    add_semantic_cache(operation)
    arguments.add_prices(operation)
    batching = parser.add_argument_group("batching")
    arguments.add_policy(batching)
    arguments.add_audit(batching)
    own = "audit requests with a client's own key too, at that client's expense"
    add_flag(batching, "--audit-own-keys", own)
    arguments.add_budget(parser.add_argument_group("budget"))


def _add_listening(group: arguments.Group) -> None:
    add_flag(group, "--host ADDRESS", "address to listen on", default="127.0.0.1")
    add_flag(group, "--port N", "port, 0 for a free one", least=0, most=65_535, default=8080)
    add_flag(
        group, "--uds PATH", "listen on a Unix socket in place of host and port; one that was left behind is replaced"
    )
    mode = "permissions of that socket (default: 600, for this user only)"
    add_flag(group, "--uds-mode MODE", mode, type=_mode)
    certificate = "a TLS certificate in PEM, and those that lead to its issuer"
    add_flag(group, "--tls-cert FILE", f"{certificate}; clients use https:// then")
    add_flag(group, "--tls-key FILE", "its key in PEM, not encrypted (default: in the same file)")
    origin = "an origin whose web pages may use the API, as https://app.example; may be repeated"
    add_flag(group, "--cors-origin ORIGIN", origin, action="append", default=[])


def _mode(text: str) -> int:
    if not re.fullmatch("0?[0-7]{3}", text):
        raise argparse.ArgumentTypeError(f"must be three octal digits, as 660, got {text!r}")
    return int(text, 8)


def _uds_mode(args: argparse.Namespace) -> int:
    return _USERS_ONLY if args.uds_mode is None else args.uds_mode


_USERS_ONLY: Final = 0o600
_NO_LOG: Final = "none"


def _add_access_log(group: arguments.Group) -> None:
    log = (
        "add a line of JSON for each request to FILE, - for standard output: ids, status, reason, time, route, model, digest of the "
        "caller, tokens and dollars, and never texts or keys"
    )
    add_flag(group, "--access-log FILE|-|none", f"{log} (default: none on loopback, else -)")


def _read_access_log(args: argparse.Namespace) -> str | None:
    if args.access_log is None:
        return None if args.uds is not None or is_loopback(args.host) else STDOUT
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
        sockets = sockets_of_worker()
        if sockets is not None:
            asyncio.run(Work(sockets, partial(make_gateway, found), workers=found.workers, grace=found.grace).run())
            return console.OK
        return asyncio.run(_serve(found) if found.workers == 1 else _supervise(found))


def make_gateway(args: argparse.Namespace, secret: bytes | None = None) -> Gateway:
    """Return the gateway of the flags, not open; *secret* is its own if neither `--secret-file` nor a cache has one.

    Raises:
        UsageError: A setting is wrong.
    """
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
            uds=args.uds,
            uds_mode=_uds_mode(args),
            tls_cert=args.tls_cert,
            tls_key=args.tls_key,
            cors_origins=args.cors_origin,
            model=args.model,
            api_key=own_key,
            **_read_connection(args),
            access_token=None if token is None else token.decode("utf-8", "replace"),
            secret=_read_secret(args, "secret_file", least=_LEAST_SECRET_BYTES) or (None if args.cache else secret),
            lane_headers=args.lane_header,
            allowed_hosts=args.allowed_host,
            access_log=_read_access_log(args),
            settings=settings,
            policy=policy,
            fallback=FallbackPolicy(canary=args.canary),
            rate_limit=read_rate_limit(args, processes=args.workers),
            cache=semantic_cache(args, exact) or exact,
            audit=arguments.read_audit(args, audit_own_keys=args.audit_own_keys),
            budget=arguments.read_budget(args),
            prices=read_prices(args),
            hooks=call_logs(),
        )
    except ConfigError as error:
        message = in_flags(arguments.with_flags(str(error), arguments.CONNECTION)).replace("--uds", "--upstream-uds")
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
    place = gateway.connections.place

    async def aclose() -> None:
        await gateway.aclose(args.grace)

    async def reload() -> None:
        await _reload(gateway, args)

    async with listening(Server(str(place), place.remedy, gateway.open, aclose, reload)) as stopped:
        await _wait(args, gateway.base_url, stopped)
    note(_summary(gateway.report()))
    return console.OK


async def _supervise(args: argparse.Namespace) -> int:
    _check_workers(args)
    place = Place(host=args.host, port=args.port, uds=args.uds, uds_mode=_uds_mode(args))
    supervisor = Supervisor(place, args.argv, args.workers, grace=args.grace, tls=args.tls_cert is not None)
    how = (supervisor.open, supervisor.aclose, supervisor.replace_all, supervisor.kill)
    async with listening(Server(str(place), place.remedy, *how)) as stopped:
        await _wait(args, f"{supervisor.origin}/v1", stopped)
    if supervisor.counted is not None:
        note(_summary(supervisor.counted))
    return console.OK


async def _wait(args: argparse.Namespace, base_url: str, stopped: asyncio.Event) -> None:
    _introduce(args, base_url)
    await stopped.wait()
    note(f"Stopping: requests under way are answered, for up to {args.grace:g} s.")


def _check_workers(args: argparse.Namespace) -> None:
    """Raise `UsageError` or `ConfigError` if a setting is wrong, or cannot be kept by several workers together."""
    if not hasattr(socket, "send_fds"):
        raise UsageError("--workers needs a system on which processes can hand sockets to each other")
    if arguments.read_budget(args) is not None and args.budget_store is None:
        raise UsageError("--workers with a budget needs --budget-store: each worker would have a budget of its own")
    for name, limit in _divided_limits(args).items():
        if limit < args.workers:
            raise UsageError(f"--{name} {limit} cannot be divided among {args.workers} workers")
    log = _read_access_log(args)
    if log is not None:
        check_log(log)
    make_gateway(argparse.Namespace(**{**vars(args), "access_log": _NO_LOG}))


def _divided_limits(args: argparse.Namespace) -> dict[str, int]:
    """Return the limits that are divided among workers, because no store holds what they have used."""
    if args.workers == 1 or args.limit_store is not None:
        return {}
    return {name: getattr(args, name) for name in ("rpm", "tpm") if getattr(args, name) is not None}


def _introduce(args: argparse.Namespace, base_url: str) -> None:
    """Print the address for clients, and what they should know."""
    report(base_url)
    where = "there" if args.uds is None else f"on {args.uds}"
    by = f" with {args.workers} workers" if args.workers > 1 else ""
    note(f"The gateway to {args.upstream} listens {where}{by}. Ctrl-C ends it.")
    for name, limit in _divided_limits(args).items():
        note(
            f"--{name} {limit} is divided: {limit // args.workers:,} for each worker; --limit-store shares it as a whole."
        )
    if lacks_version(args.upstream):
        note("--upstream has no version in its path: most APIs are at an address that ends in /v1.")
    if not args.no_own_key and (args.api_key_command or args.api_key_env or os.environ.get("OPENAI_API_KEY")):
        clients = "with the access token" if args.access_token_file else "without a key"
        note(f"Clients {clients} use {_name_of_key(args)}, for chat completions, embeddings and the list of models.")


async def _reload(gateway: Gateway, args: argparse.Namespace) -> None:
    """Read the files of the flags again, and let the key be asked for again; if one is wrong, leave all as it was."""
    try:
        if args.api_key_command is not None and not args.no_own_key:
            await asyncio.to_thread(arguments.read_key, args)  # a command that fails would make the calls fail
        token = _read_secret(args, "access_token_file", least=1)
        gateway.reload(
            prices=read_prices(args), access_token=None if token is None else token.decode("utf-8", "replace")
        )
    except (UsageError, ConfigError) as error:
        note(f"microbatch serve: not reloaded, all stays as it was: {error}")
    else:
        note("Reloaded: key, access token, prices and TLS files.")


def _summary(report: Report) -> str:
    stats, texts = report.stats, report.texts
    asked = plural(max(0, stats.items - texts), "chat completion")
    if texts:
        asked = f"{asked} and {plural(texts, 'text')} to embed"
    combined = f"{asked} with {plural(stats.upstream_calls - stats.forwarded, 'call')}"
    failed = f", {stats.failed:,} failed" if stats.failed else ""
    return f"served {combined}{failed}, and relayed {plural(stats.forwarded, 'request')}"
