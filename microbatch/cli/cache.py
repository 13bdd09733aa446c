r"""`microbatch cache CACHE [ACTION] [options]`: see what a cache of answers holds; delete some of it, or all.

CACHE is a file (SQLite), or the address of a Redis server, redis://HOST:PORT/DB.
A cache has the answers, and no questions: an entry is found by its key, a digest
of everything that was asked.

ACTION is one of
  stats    how many entries there are, of which models, how old (the default)
  inspect  show the newest entries, or those with the KEYs that follow
  delete   delete entries: those with the KEYs that follow, or those that
           --tenant, --model and --older-than select, if several are given,
           those that all of them select
  clear    delete all entries
  export   write a line of JSON for each entry

Of a semantic cache it has the answers only: the vectors of questions, and what
was shown about them, are those of the process that uses it.

Entries of earlier releases, and damaged ones, do not say whose they are:
they are deleted with any --tenant. A running batcher may store answers that it
has under way at that moment.

Exit status: 0 done, 1 some of it could not be done, 2 something is wrong with
the command or its files, 130 stopped.

Examples:
  microbatch cache answers.sqlite
  microbatch cache answers.sqlite inspect --limit 3
  microbatch cache answers.sqlite delete --older-than 7d --model gpt-4.1-mini
  microbatch cache redis://localhost:6379/0 delete --tenant ann
  microbatch cache answers.sqlite clear --yes
  microbatch cache answers.sqlite export | jq .text
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import re
import sys
import textwrap
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.caching import entry as entries
from microbatch.caching.deletion import of_tenant
from microbatch.caching.redis import RedisCache
from microbatch.cli import console
from microbatch.cli.arguments import add_flag, flag
from microbatch.cli.console import UsageError, note, plural, print_result, report, report_json
from microbatch.cli.plan import cache_at
from microbatch.cli.writing.exporting import check_target, exporting
from microbatch.errors import ConfigError, StorageError
from microbatch.storage.address import is_address

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from microbatch.caching.deletion import Matches
    from microbatch.caching.sqlite import SQLiteCache

    Found = tuple[bytes, entries.Entry | entries.Entry1]  # the key, and the entry

_ACTIONS: Final = ("stats", "inspect", "delete", "clear", "export")
_ACTIONS_WITH: Final = {
    "keys": ("inspect", "delete"),
    "tenant": ("stats", "inspect", "delete", "export"),
    "model": ("stats", "inspect", "delete", "export"),
    "older_than": ("stats", "inspect", "delete", "export"),
    "limit": ("inspect",),
    "output": ("export",),
    "yes": ("clear",),
}
"""The actions on which each argument has an effect."""

_FILTERS: Final = ("tenant", "model", "older_than")
_LIMIT: Final = 10
_AGE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SHOWN: Final = 400  # characters of an answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `cache`."""
    parser.add_argument("cache", metavar="CACHE", help="a file (SQLite), or redis://HOST:PORT/DB")
    action = "stats, inspect, delete, clear or export (default: stats)"
    parser.add_argument("action", metavar="ACTION", nargs="?", choices=_ACTIONS, default="stats", help=action)
    keys = "with inspect and delete: the keys of entries, as inspect shows them"
    parser.add_argument("keys", metavar="KEY", nargs="*", help=keys)
    group = parser.add_argument_group("which entries")
    add_flag(group, "--tenant NAME", "those of this tenant")
    add_flag(group, "--model NAME", "those answered by this model, as stats shows its name")
    age = "those stored longer ago: a number and a unit, such as 90s, 30m, 12h, 7d or 2w"
    add_flag(group, "--older-than AGE", age, type=_age)
    add_flag(parser, "--limit N", f"with inspect: show at most N entries (default: {_LIMIT})")
    output = "with export: the file to write; - is stdout (default: -)"
    parser.add_argument("-o", "--output", metavar="FILE.jsonl", help=output)
    add_flag(parser, "--yes", "with clear: do not ask")
    figures = "print the figures as a JSON object, the last line of stdout; with inspect one object per entry"
    add_flag(parser, "--json", figures)


def _age(text: str) -> float:
    found = _AGE.fullmatch(text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"must be a time such as 90s, 30m, 12h, 7d or 2w, got {text!r}")
    return float(found[1]) * _SECONDS[found[2]]


def run(args: argparse.Namespace) -> int:
    """Do one thing with a cache."""
    _check(args)
    return asyncio.run(_act(args))


def _check(args: argparse.Namespace) -> None:
    """Refuse a cache that does not exist, arguments without an effect, and deletions that do not say of what."""
    if not is_address(args.cache) and (not (path := Path(args.cache)).exists() or not path.stat().st_size):
        cache_at(args.cache)  # it may look like the address of a server
        raise UsageError(f"there is no cache {args.cache!r}")
    for name, actions in _ACTIONS_WITH.items():
        if getattr(args, name) not in (None, [], False) and args.action not in actions:
            what = "a KEY" if name == "keys" else flag(name)
            raise UsageError(f"{what} has no effect on {args.action}; it is for {' and '.join(actions)}")
    filters = [flag(name) for name in _FILTERS if getattr(args, name) is not None]
    if args.keys and filters:
        raise UsageError(f"give keys or {filters[0]}, not both")
    if args.action == "delete" and not (args.keys or filters):
        raise UsageError(f"delete needs keys, or {', '.join(map(flag, _FILTERS))}; clear deletes everything")
    if args.action == "export" and args.json and args.output in (None, "-"):
        raise UsageError("export fills stdout; leave out --json, or name a file with -o")
    check_target(args.output)
    if args.action == "clear" and not args.yes and not sys.stdin.isatty():
        raise UsageError("clear deletes all entries; say so with --yes")


async def _act(args: argparse.Namespace) -> int:
    keys = _keys(args.keys)
    cache = cache_at(args.cache)
    await cache.open()
    try:
        if isinstance(cache, RedisCache):
            await _reach(cache)
        if args.action == "clear":
            return await _clear(cache, args)
        if args.action == "delete" and keys:
            return await _delete_keys(cache, args, keys)
        matches = await _selection(cache, args, keys)
        if args.action == "delete":
            return _report_deleted(args, await cache.erase(matches))
        act = {"stats": _show_stats, "inspect": _inspect, "export": _export}[args.action]
        return await act(cache, args, matches)
    finally:
        await cache.aclose()


async def _reach(cache: RedisCache) -> None:
    try:
        await cache.reach()
    except StorageError as error:
        raise ConfigError(f"the cache cannot be used: {error}") from error


def _keys(words: list[str]) -> list[bytes]:
    keys = []
    for word in words:
        try:
            keys.append(bytes.fromhex(word))
        except ValueError:
            raise UsageError(f"{word!r} is no key; inspect shows the keys of entries") from None
    return keys


async def _selection(cache: SQLiteCache | RedisCache, args: argparse.Namespace, keys: list[bytes]) -> Matches:
    """Return what matches the entries that the arguments select."""
    wanted = set(keys)
    of_this = None if args.tenant is None else await of_tenant(cache, args.tenant)
    before = None if args.older_than is None else _now() - args.older_than

    def matches(key: bytes, value: bytes) -> bool:
        if (wanted and key not in wanted) or (of_this is not None and not of_this(key, value)):
            return False
        if args.model is None and before is None:
            return True
        entry = entries.decode(value)
        return entry is not None and args.model in (None, entry.model) and (before is None or entry.stored_at < before)

    return matches


def _now() -> float:
    return time.time()  # noqa: TID251 entries outlive processes


async def _found(cache: SQLiteCache | RedisCache, matches: Matches) -> AsyncIterator[list[tuple[bytes, bytes]]]:
    async for page in cache.entries():
        yield [(key, value) for key, value in page if matches(key, value)]


# --- figures


class Figures(msgspec.Struct):
    """The content of a cache, counted.

    Attributes:
        bytes: Of keys and answers, as stored.
        expired: Entries that are kept and not handed out any more.
        unreadable: Entries that are damaged; they count for nothing else than `entries` and `bytes`.
        batched: Answers of combined calls.
        tenants: Tenants that entries belong to.
        oldest_at: When the oldest was stored, in seconds since 1970; None if there are none.
        models: The entries and bytes of each model; "" for those that name none.
    """

    entries: int = 0
    bytes: int = 0
    expired: int = 0
    unreadable: int = 0
    batched: int = 0
    tenants: int = 0
    oldest_at: float | None = None
    newest_at: float | None = None
    models: dict[str, dict[str, int]] = {}


async def _show_stats(cache: SQLiteCache | RedisCache, args: argparse.Namespace, matches: Matches) -> int:
    figures, now, tenants = Figures(), _now(), set()
    async for page in _found(cache, matches):
        for key, value in page:
            entry = entries.decode(value)
            _count(figures, len(key) + len(value), entry, now)
            if isinstance(entry, entries.Entry) and entry.tenant is not None:
                tenants.add(entry.tenant)
    figures.tenants = len(tenants)
    if args.json:
        print_result(msgspec.json.encode(figures).decode())
        return console.OK
    rows = [
        (model or "(no model)", f"{each['entries']:,}", f"{each['bytes']:,}")
        for model, each in sorted(figures.models.items(), key=lambda item: -item[1]["entries"])
    ]
    total = ("all", f"{figures.entries:,}", f"{figures.bytes:,}")
    print_result(console.table(("model", "entries", "bytes"), [*rows, total]))
    for line in _remarks(figures):
        print_result(line)
    return console.OK


def _count(figures: Figures, size: int, entry: entries.Entry | entries.Entry1 | None, now: float) -> None:
    figures.entries += 1
    figures.bytes += size
    if entry is None:
        figures.unreadable += 1
        return
    model = figures.models.setdefault(entry.model or "", {"entries": 0, "bytes": 0})
    model["entries"] += 1
    model["bytes"] += size
    figures.expired += entry.expires_at is not None and entry.expires_at <= now
    figures.batched += isinstance(entry, entries.Entry) and entry.batch_size > 1 and not entry.is_vector
    figures.oldest_at = entry.stored_at if figures.oldest_at is None else min(figures.oldest_at, entry.stored_at)
    figures.newest_at = entry.stored_at if figures.newest_at is None else max(figures.newest_at, entry.stored_at)


def _remarks(figures: Figures) -> list[str]:
    if figures.oldest_at is None or figures.newest_at is None:
        found = []
    else:
        found = [f"\nStored from {_date(figures.oldest_at)} to {_date(figures.newest_at)}."]
        tenants = f" {plural(figures.tenants, 'tenant')} named." if figures.tenants else ""
        found.append(f"{plural(figures.batched, 'answer')} of combined calls.{tenants}")
    if figures.expired:
        found.append(f"{_entries(figures.expired)} expired, and not handed out any more.")
    if figures.unreadable:
        found.append(f"{figures.unreadable:,} cannot be read.")
    return found


def _date(at: float) -> str:
    try:
        return f"{datetime.fromtimestamp(at, UTC).astimezone():%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):  # it was damaged in a way that leaves it a number
        return f"{at:g} s after 1970"


# --- entries


async def _inspect(cache: SQLiteCache | RedisCache, args: argparse.Namespace, matches: Matches) -> int:
    """Show the newest entries, or those that are named; return the exit status."""
    limit = args.limit or (None if args.keys else _LIMIT)
    shown: list[Found] = []
    total = 0
    async for page in _found(cache, matches):
        found = [(key, entry) for key, value in page if (entry := entries.decode(value)) is not None]
        total += len(page)
        shown = heapq.nlargest(limit or total, [*shown, *found], key=lambda each: each[1].stored_at)
    for key, entry in shown:
        print_result(_as_json(key, entry) if args.json else _as_text(key, entry, whole=bool(args.keys)))
    missing = {key.hex() for key in _keys(args.keys)} - {key.hex() for key, _ in shown}
    for name in sorted(missing):
        note(f"there is no entry {name}, or it cannot be read")
    if not args.json and not args.keys:
        print_result(f"{len(shown):,} of {_entries(total)}")
    return console.SOME_FAILED if missing else console.OK


def _as_json(key: bytes, entry: entries.Entry | entries.Entry1) -> str:
    return msgspec.json.encode(_line(key, entry)).decode()


def _line(key: bytes, entry: entries.Entry | entries.Entry1) -> dict[str, Any]:
    known = entry if isinstance(entry, entries.Entry) else None
    is_vector = known is not None and known.is_vector
    line = {
        "key": key.hex(),
        "model": entry.model,
        "text": entry.text,
        "stored_at": entry.stored_at,
        "expires_at": entry.expires_at,
        "batch_size": None if known is None else known.batch_size,
        "tenant": None if known is None or known.tenant is None else known.tenant.hex(),
        "usage": {
            "prompt_tokens": entry.prompt_tokens,
            "completion_tokens": entry.completion_tokens,
            "cached_tokens": entry.cached_tokens,
        },
        "body": None if entry.body is None or is_vector else msgspec.Raw(entry.body),
    }
    vector = None if known is None else known.vector()
    return line if vector is None else line | {"vector": vector.tolist()}


def _as_text(key: bytes, entry: entries.Entry | entries.Entry1, *, whole: bool) -> str:
    how = "asked in an unknown way"
    if isinstance(entry, entries.Entry):
        how = "asked alone" if entry.batch_size == 1 else f"asked in a batch of {entry.batch_size}"
    ends = "never expires" if entry.expires_at is None else f"expires {_date(entry.expires_at)}"
    head = f"{key.hex()}\n    {entry.model or 'no model'}, {how}, stored {_date(entry.stored_at)}, {ends}"
    text = entry.text if whole or len(entry.text) <= _SHOWN else f"{entry.text[:_SHOWN]}..."
    if isinstance(entry, entries.Entry) and (vector := entry.vector()) is not None:
        text = f"the vector of a text, {len(vector):,} numbers"
    return f"{head}\n{textwrap.indent(text, '    | ', lambda _: True)}\n"


async def _export(cache: SQLiteCache | RedisCache, args: argparse.Namespace, matches: Matches) -> int:
    target = args.output or "-"
    exported = unreadable = 0
    with exporting(target) as file:
        async for page in _found(cache, matches):
            for key, value in page:
                entry = entries.decode(value)
                if entry is None:
                    unreadable += 1
                    continue
                exported += 1
                file.write(msgspec.json.encode(_line(key, entry)) + b"\n")
    if args.json:
        report_json({"exported": exported, "unreadable": unreadable})
    else:
        (note if target == "-" else report)(f"{_entries(exported)} exported{'' if target == '-' else f' to {target}'}")
        if unreadable:
            note(f"{_entries(unreadable)} cannot be read, and left out")
    return console.SOME_FAILED if unreadable else console.OK


# --- deleting


async def _clear(cache: SQLiteCache | RedisCache, args: argparse.Namespace) -> int:
    if not args.yes:
        note(f"Delete all entries of {args.cache if not is_address(args.cache) else 'this cache'}? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            note("Nothing was deleted.")
            return console.SOME_FAILED
    return _report_deleted(args, await cache.clear())


async def _delete_keys(cache: SQLiteCache | RedisCache, args: argparse.Namespace, keys: list[bytes]) -> int:
    found = [key for key in keys if await cache.delete([key])]
    for key in keys:
        if key not in found:
            note(f"there is no entry {key.hex()}")
    status = _report_deleted(args, len(found))
    return console.SOME_FAILED if len(found) < len(keys) else status


def _report_deleted(args: argparse.Namespace, number: int) -> int:
    if args.json:
        report_json({"deleted": number})
    else:
        report(f"{_entries(number)} deleted")
    return console.OK


def _entries(number: int) -> str:
    return f"{number:,} {'entry' if number == 1 else 'entries'}"
