"""`microbatch spool`: what is in a spool, what became of it, and a way in and out for files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from microbatch.cli import console, dead_letters
from microbatch.cli.answers import NotWritten
from microbatch.cli.arguments import add_question
from microbatch.cli.console import UsageError, note, say, seconds, table
from microbatch.cli.flags import flag, whole_number
from microbatch.cli.spool_files import Export, Put
from microbatch.cli.stores import is_address, spool_at
from microbatch.errors import StorageError
from microbatch.spool.records import MAX_ALONE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable, Callable

    from microbatch.spool.records import Counts, Spool

USAGE = """\
microbatch spool SPOOL [options]
       microbatch spool SPOOL --put INPUT.jsonl [options]
       microbatch spool SPOOL --dead | --requeue [ID ...] | --export FILE.jsonl"""
HELP = "queue questions for later; see what waits, what failed, what was answered"
DESCRIPTION = """\
A spool holds requests that nobody waits for, until a worker has answered them,
and keeps the answers for 7 days. SPOOL is a file (SQLite), or the address of a
Redis server, redis://HOST:PORT/DB. Without options this shows how many requests
are where.

A request that failed, or whose worker died, is asked again in half a batch,
then alone. One that has failed 3 times alone is a dead letter: it is kept, with
its error, until it is put back with --requeue.

Exit status: 0 done, 1 some of it could not be done, 2 something is wrong with
the command or its files, 130 stopped.
"""
EXAMPLES = r"""
examples:
  microbatch spool jobs.sqlite --put products.jsonl \
      --system @instructions.txt --labels electronics,clothing,home,other \
      --template "Product: {name}\nDescription: {description}"

  microbatch worker jobs.sqlite --model gpt-4.1-mini    (answers them)
  microbatch spool jobs.sqlite                          (what is where)
  microbatch spool jobs.sqlite --dead                   (what failed, and why)
  microbatch spool jobs.sqlite --requeue                (all of that, once more)
  microbatch spool jobs.sqlite --requeue p17 p99        (only these)
  microbatch spool jobs.sqlite --export answers.jsonl
  microbatch spool jobs.sqlite --export - | jq '.output | fromjson?'
"""

_QUESTION: Final = ("system", "template", "labels", "schema", "id_field", "max_tokens", "temperature", "model")

# --- the flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `spool`."""
    parser.add_argument("spool", metavar="SPOOL", help="a file, or redis://HOST:PORT/DB; --put makes a file")
    actions = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    actions.add_argument(
        "--put",
        metavar="INPUT.jsonl",
        help="queue a request for every line, as `microbatch run` would ask it; one that is there already is left as it is",
    )
    actions.add_argument("--dead", action="store_true", help="list the dead letters, oldest first")
    actions.add_argument(
        "--requeue",
        metavar="ID",
        nargs="*",
        help="put dead letters back, all or those with these ids, as if they had never been asked",
    )
    actions.add_argument(
        "--export",
        metavar="FILE.jsonl",
        help="write a line for every request that is kept: custom_id, tenant, state (waiting, leased, in_job, done, dead), "
        "output, error, deliveries, usage, cost_usd, "
        "answered_at (seconds since 1970); - is stdout",
    )
    parser.add_argument(
        "--tenant",
        metavar="NAME",
        help="whose requests: with --put and --requeue ID the tenant that the ids belong to (default: to none), "
        "else those that are shown, exported or put back (default: all)",
    )
    parser.add_argument(
        "--max-alone",
        metavar="N",
        type=whole_number(1),
        default=MAX_ALONE,
        help=f"as the workers have it: a request that failed N times alone is dead (default: {MAX_ALONE})",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the figures as a JSON object, the last line of stdout; with --dead an object a line for each letter",
    )
    question = parser.add_argument_group("what is asked, with --put")
    add_question(question)
    question.add_argument("--model", metavar="NAME", help="the model (default: the line's own, else the worker's)")


# --- the command


def run(args: argparse.Namespace) -> int:
    """Do one thing with a spool.

    Raises:
        ConfigError: It cannot be opened.
        UsageError: Something is wrong with the command or its files; nothing was done.
    """
    _check(args)
    action = _action(args)
    try:
        return asyncio.run(_with(spool_at(args.spool, max_alone=args.max_alone), action))
    except (NotWritten, StorageError) as error:
        note(f"microbatch spool: {error}")
        return console.SOME_FAILED


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that would do nothing, and a spool that looking would make."""
    if args.put is None:
        given = [flag(name) for name in _QUESTION if getattr(args, name) is not None]
        if given:
            raise UsageError(f"{given[0]} says what is asked; it needs --put INPUT.jsonl")
        if not is_address(args.spool) and not Path(args.spool).exists():
            raise UsageError(f"there is no spool {args.spool!r}; --put INPUT.jsonl makes one")
        if args.tenant is not None and not (args.dead or args.requeue is not None or args.export is not None):
            raise UsageError(
                "--tenant needs --put, --dead, --requeue or --export; the figures are those of all tenants"
            )


def _action(args: argparse.Namespace) -> Callable[[Spool], Awaitable[int]]:
    if args.put is not None:
        return Put(args).go
    if args.export is not None:
        return Export(args).go
    if args.requeue is not None:
        return lambda spool: dead_letters.requeue(spool, args)
    if args.dead:
        return lambda spool: dead_letters.list_them(spool, args)
    return lambda spool: _show(spool, args)


async def _with(spool: Spool, action: Callable[[Spool], Awaitable[int]]) -> int:
    await spool.open()
    try:
        return await action(spool)
    finally:
        await spool.aclose()


# --- what is where


class Figures(msgspec.Struct, kw_only=True):
    """How many requests are where, as `--json` prints it.

    Attributes:
        waiting_full: Those that wait for a full batch.
        waiting_half: Those that failed once, and wait for half a batch.
        waiting_alone: Those that failed more than once, and wait to go alone.
        leased: Those that a worker has.
        in_job: Those in a batch job at the provider.
        depth: All of these.
        done: Answers that are kept.
        dead: Dead letters.
        oldest_s: Seconds for which the oldest of `depth` has been there; None if there is none.
        lost: Requests and answers that the server has dropped.
    """

    waiting_full: int
    waiting_half: int
    waiting_alone: int
    leased: int
    in_job: int
    depth: int
    done: int
    dead: int
    oldest_s: float | None
    lost: int


async def _show(spool: Spool, args: argparse.Namespace) -> int:
    counts = await spool.counts()
    if args.json:
        say(msgspec.json.encode(figures(counts)).decode())
        return console.OK
    say(told(counts))
    if counts.oldest is not None:
        say()
        say(f"The oldest of those still to be answered was put {seconds(counts.oldest)} ago.")
    if counts.dead:
        say()
        say("--dead tells why they died, --requeue puts them back.")
    if counts.lost:
        say()
        say(console.lost(counts.lost))
    return console.OK


def figures(counts: Counts) -> Figures:
    """Return *counts* as `--json` prints them."""
    full, half, alone = counts.waiting
    return Figures(
        waiting_full=full,
        waiting_half=half,
        waiting_alone=alone,
        leased=counts.leased,
        in_job=counts.in_job,
        depth=counts.depth,
        done=counts.done,
        dead=counts.dead,
        oldest_s=None if counts.oldest is None else round(counts.oldest, 3),
        lost=counts.lost,
    )


def told(counts: Counts) -> str:
    """Return *counts* as a table."""
    full, half, alone = counts.waiting
    rows = [
        ("waiting for a full batch", full),
        ("waiting for half a batch, after a failure", half),
        ("waiting to go alone, after two", alone),
        ("with a worker", counts.leased),
        ("at the provider, in a batch job", counts.in_job),
        ("all still to be answered", counts.depth),
        ("answered", counts.done),
        ("dead letters", counts.dead),
    ]
    if counts.lost:
        rows.append(("lost", counts.lost))
    return table(("", "requests"), [(name, f"{number:,}") for name, number in rows])
