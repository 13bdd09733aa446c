"""The dead letters of a spool: shown, and put back."""

from __future__ import annotations

import textwrap
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from microbatch.cli import console
from microbatch.cli.console import COLUMNS, note, plural, say, tell
from microbatch.spool.records import Name

if TYPE_CHECKING:
    import argparse

    from microbatch.spool.records import DeadLetter, Spool, State

_NOT_DEAD: Final[dict[State, str]] = {
    "unknown": "the spool knows no such id",
    "waiting": "it is waiting to be asked already",
    "leased": "a worker has it",
    "in_job": "it is in a batch job at the provider",
    "done": "it is answered",
    "lost": "the server has dropped it; put it again",
}


async def list_them(spool: Spool, args: argparse.Namespace) -> int:
    """Show the dead letters, of all tenants or one; return the exit status."""
    listed = 0
    async for letter in spool.dead_letters():
        if args.tenant in (None, letter.item.name.tenant):
            listed += 1
            say(_as_json(letter) if args.json else _as_text(letter))
    if not args.json:
        say(plural(listed, "dead letter"))
    return console.OK


def _as_json(letter: DeadLetter) -> str:
    name = letter.item.name
    told = {
        "custom_id": name.id,
        "tenant": name.tenant,
        "deliveries": letter.deliveries,
        "error": letter.error,
        "died_at": letter.died_at,
    }
    return msgspec.json.encode(told).decode()


def _as_text(letter: DeadLetter) -> str:
    name = letter.item.name
    whose = "" if name.tenant is None else f" of tenant {name.tenant}"
    died = datetime.fromtimestamp(letter.died_at, UTC).astimezone()
    head = f"{name.id}{whose}: dead since {died:%Y-%m-%d %H:%M:%S}, asked {plural(letter.deliveries, 'time')}"
    error = textwrap.fill(letter.error, COLUMNS, initial_indent="    ", subsequent_indent="    ")
    return f"{head}\n{error}\n"


async def requeue(spool: Spool, args: argparse.Namespace) -> int:
    """Put dead letters back, all or those that are named; tell which of the names are none, and return the exit status."""
    dead = [letter.item.name async for letter in spool.dead_letters()]
    if args.requeue:
        wanted = dict.fromkeys(Name(args.tenant, name) for name in args.requeue)
        names = [name for name in dead if name in wanted]
    else:
        wanted = {}
        names = [name for name in dead if args.tenant in (None, name.tenant)]
    found = set(names)
    others = [name for name in wanted if name not in found]
    everything = not args.requeue and args.tenant is None
    count = await spool.requeue(None if everything else names)
    states = {name.id: known.state for name, known in zip(others, await spool.find(others), strict=True)}
    for name, state in states.items():
        note(f"{name} is no dead letter: {_NOT_DEAD.get(state, 'it died just now')}")
    if args.json:
        tell(msgspec.json.encode({"requeued": count, "not_dead": states}).decode())
    else:
        tell(f"{plural(count, 'dead letter')} put back")
    return console.SOME_FAILED if others else console.OK
