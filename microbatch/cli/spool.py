r"""`microbatch spool SPOOL [options]`: queue questions for later; see what waits, what failed, what was answered.

A spool holds requests that can wait until a worker has answered them, and keeps
the answers for 7 days. SPOOL is a file (SQLite), or the address of a Redis
server, redis://HOST:PORT/DB. Without options this shows how many requests are
in which state.

A request that failed, or whose worker died, is asked again in half a batch,
then alone. One that has failed 3 times alone is a dead letter: it is kept, with
its error, until it is put back with --requeue.

Exit status: 0 done, 1 some of it could not be done, 2 something is wrong with
the command or its files, 130 stopped.

Examples:
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

from __future__ import annotations

import asyncio
import textwrap
from collections import Counter
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.cli import console
from microbatch.cli.arguments import add_flag, add_input, add_question, flag
from microbatch.cli.console import UsageError, note, plural, print_result, report, report_json, seconds
from microbatch.cli.plan import check_spool, read_input, read_questions, spool_at
from microbatch.cli.reading.input import BadLine, InputChanged
from microbatch.cli.reading.questions import payload_of
from microbatch.cli.stopping import stoppable
from microbatch.cli.summary import Failures, skipped
from microbatch.cli.writing.exporting import check_target, exporting
from microbatch.cli.writing.output import NotWritten
from microbatch.errors import ConfigError, StorageError
from microbatch.spool.payload import Answer
from microbatch.spool.records import MAX_ALONE, Name
from microbatch.storage.address import is_address

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from microbatch.cli.reading.input import Place
    from microbatch.spool.records import DeadLetter, Item, Kept, Spool, State

_QUESTION: Final = (
    *("input_format", "encoding", "id_field", "system", "template", "examples", "on_empty", "labels", "schema"),
    *("max_tokens", "temperature", "model"),
)

_AT_ONCE: Final = 500
"""Requests put in one transaction."""
_CONFLICT: Final = "the spool holds another request under this id; it stays, and this one was not queued"

_STATES: Final[dict[State, str]] = {"leased": "with a worker", "in_job": "in a batch job", "done": "answered"}
_NOT_DEAD: Final[dict[State, str]] = {
    "unknown": "the spool knows no such id",
    "waiting": "it is waiting to be asked already",
    "leased": "a worker has it",
    "in_job": "it is in a batch job at the provider",
    "done": "it is answered",
    "lost": "the server has dropped it; put it again",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `spool`."""
    parser.add_argument("spool", metavar="SPOOL", help="a file, or redis://HOST:PORT/DB; --put makes a file")
    actions = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    put = (
        "queue a request for every record of these files, as `microbatch run` would ask it; "
        "one that is there already is left as it is"
    )
    add_flag(actions, "--put INPUT", put, nargs="+", action="extend")
    add_flag(actions, "--dead", "list the dead letters, oldest first")
    requeue = "put dead letters back, all or those with these ids, as if they had never been asked"
    add_flag(actions, "--requeue ID", requeue, nargs="*")
    line = (
        "custom_id, tenant, state, output, error, deliveries, usage, cost_usd, answered_at (seconds since 1970), model"
    )
    states = "the states are waiting, leased, in_job, done and dead"
    exported = f"write a line for every request that is kept: {line}; {states}; - is stdout"
    add_flag(actions, "--export FILE.jsonl", exported)
    tenant = (
        "with --put and --requeue ID: the tenant that the ids belong to (default: none); "
        "else: the tenant whose requests are shown, exported or put back (default: all)"
    )
    add_flag(parser, "--tenant NAME", tenant)
    max_alone = "the same as that of the workers: a request that failed N times alone is dead"
    add_flag(parser, "--max-alone N", max_alone, default=MAX_ALONE)
    figures = "print the figures as a JSON object, the last line of stdout; with --dead one object per letter"
    add_flag(parser, "--json", figures)
    question = parser.add_argument_group("what is asked, with --put")
    add_input(question)
    add_question(question)
    add_flag(question, "--model NAME", "the model (default: the line's own, else the worker's)")


def run(args: argparse.Namespace) -> int:
    """Do one thing with a spool."""
    _check(args)
    put = None if args.put is None else Put(args)
    try:
        return asyncio.run(_act(args, put))
    except (NotWritten, StorageError) as error:
        note(f"microbatch spool: {error}")
        return console.SOME_FAILED


def _check(args: argparse.Namespace) -> None:
    """Refuse flags without an effect, a spool that does not exist, and an export to a file that does."""
    if args.put is not None:
        return
    given = [flag(name) for name in _QUESTION if getattr(args, name) is not None]
    if given:
        raise UsageError(f"{given[0]} says what is asked; it needs --put INPUT.jsonl")
    check_spool(args.spool)
    if args.tenant is not None and not (args.dead or args.requeue is not None or args.export is not None):
        raise UsageError("--tenant needs --put, --dead, --requeue or --export; the figures are those of all tenants")
    if args.export == "-" and args.json:
        raise UsageError("--export - fills stdout with the export; leave out --json")
    check_target(args.export)


async def _act(args: argparse.Namespace, put: Put | None) -> int:
    spool = spool_at(args.spool, max_alone=args.max_alone)
    await spool.open()
    try:
        if put is not None:
            return await put.go(spool)
        if args.export is not None:
            return await export(spool, args)
        if args.requeue is not None:
            return await _requeue(spool, args)
        return await (_list_dead if args.dead else _show)(spool, args)
    finally:
        await spool.aclose()


# --- figures

_FIGURES: Final = {
    "waiting_full": "waiting for a full batch",
    "waiting_half": "waiting for half a batch, after a failure",
    "waiting_alone": "waiting to go alone, after two",
    "leased": "with a worker",
    "in_job": "at the provider, in a batch job",
    "depth": "all still to be answered",
    "done": "answered",
    "dead": "dead letters",
}


async def _show(spool: Spool, args: argparse.Namespace) -> int:
    counts = await spool.counts()
    waiting = zip(("waiting_full", "waiting_half", "waiting_alone"), counts.waiting, strict=True)
    others = {name: getattr(counts, name) for name in ("leased", "in_job", "depth", "done", "dead")}
    figures = dict(waiting) | others
    if args.json:
        oldest = None if counts.oldest is None else round(counts.oldest, 3)
        print_result(msgspec.json.encode(figures | {"oldest_s": oldest, "lost": counts.lost}).decode())
        return console.OK
    rows = [(text, f"{figures[name]:,}") for name, text in _FIGURES.items()]
    print_result(console.table(("", "requests"), rows + ([("lost", f"{counts.lost:,}")] if counts.lost else [])))
    if counts.oldest is not None:
        print_result(f"\nThe oldest of those still to be answered was put {seconds(counts.oldest)} ago.")
    if counts.dead:
        print_result("\n--dead shows why they died, --requeue puts them back.")
    if counts.lost:
        print_result(f"\n{lost_requests(counts.lost)}")
    return console.OK


def lost_requests(number: int) -> str:
    """Return a warning that the server of a spool has dropped *number* requests."""
    return (
        f"{plural(number, 'request')} lost: the server has dropped their content, their places in the queue or their answers. "
        "Put them again; --requeue puts back those whose content is there."
    )


# --- dead letters


async def _list_dead(spool: Spool, args: argparse.Namespace) -> int:
    listed = 0
    async for letter in spool.dead_letters():
        if args.tenant in (None, letter.item.name.tenant):
            listed += 1
            print_result(_as_json(letter) if args.json else _as_text(letter))
    if not args.json:
        print_result(plural(listed, "dead letter"))
    return console.OK


def _as_json(letter: DeadLetter) -> str:
    name = {"custom_id": letter.item.name.id, "tenant": letter.item.name.tenant}
    fields = name | {"deliveries": letter.deliveries, "error": letter.error, "died_at": letter.died_at}
    return msgspec.json.encode(fields).decode()


def _as_text(letter: DeadLetter) -> str:
    name = letter.item.name
    tenant = "" if name.tenant is None else f" of tenant {name.tenant}"
    died = datetime.fromtimestamp(letter.died_at, UTC).astimezone()
    head = f"{name.id}{tenant}: dead since {died:%Y-%m-%d %H:%M:%S}, asked {plural(letter.deliveries, 'time')}"
    error = textwrap.fill(letter.error, console.COLUMNS, initial_indent="    ", subsequent_indent="    ")
    return f"{head}\n{error}\n"


async def _requeue(spool: Spool, args: argparse.Namespace) -> int:
    """Put dead letters back, all or those that are named; report the names that are none."""
    dead = [letter.item.name async for letter in spool.dead_letters()]
    wanted = dict.fromkeys(Name(args.tenant, name) for name in args.requeue)
    names = [name for name in dead if (name in wanted if wanted else args.tenant in (None, name.tenant))]
    found = set(names)
    others = [name for name in wanted if name not in found]
    everything = not wanted and args.tenant is None
    count = await spool.requeue(None if everything else names)
    states = {name.id: known.state for name, known in zip(others, await spool.find(others), strict=True)}
    for name, state in states.items():
        note(f"{name} is no dead letter: {_NOT_DEAD.get(state, 'it died just now')}")
    if args.json:
        report_json({"requeued": count, "not_dead": states})
    else:
        report(f"{plural(count, 'dead letter')} put back")
    return console.SOME_FAILED if others else console.OK


# --- files


class Put:
    """Queues a request for every record of the files of `--put`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._source = read_input(args, args.put, read_questions(args, needs_model=False))
        self._counts: Counter[str] = Counter()
        self._failures = Failures()
        self._makes_spool = not is_address(args.spool) and not Path(args.spool).exists()

    async def go(self, spool: Spool) -> int:
        """Queue them, report and return the exit status."""
        if self._makes_spool:
            note(f"made the spool {self._args.spool!r}")  # its name may be a mistake
        stopped, broken = True, None
        with stoppable():
            try:
                items = self._items()
                while some := list(islice(items, _AT_ONCE)):
                    outcomes = await spool.put([item for _, item in some])
                    for (place, _), outcome in zip(some, outcomes, strict=True):
                        self._count(place, outcome, _CONFLICT if outcome == "conflict" else None)
            except (InputChanged, UsageError, OSError, StorageError) as error:
                broken = error
            stopped = False
        return self._report(stopped=stopped, broken=broken)

    def _items(self) -> Iterator[tuple[Place, Item]]:
        """Yield the place of each record and the request that is put for it."""
        for row in self._source.requests():
            if isinstance(row, BadLine):
                self._count(row.place, "failed", row.problem)
                continue
            place, request = row
            try:
                payload = payload_of(request, self._args.model)
            except ConfigError as error:
                self._count(place, "failed", str(error))
            else:
                yield place, payload.item(Name(self._args.tenant, request.id or ""))

    def _count(self, place: Place, outcome: str, problem: str | None) -> None:
        self._counts[outcome] += 1
        if problem is not None:
            self._failures.add(problem, str(place.number), place.prefix)

    def _report(self, *, stopped: bool, broken: Exception | None) -> int:
        for line in (*self._failures.lines(), *skipped(self._source.skipped)):
            note(line)
        items = self._source.items
        new, known, conflicts, failed = (self._counts[name] for name in ("new", "known", "conflict", "failed"))
        if self._args.json:
            counts = {"items": items, "new": new, "known": known, "conflicts": conflicts, "failed": failed}
            report_json(counts | {"skipped": self._source.skipped})
        else:
            report(
                f"{plural(items, 'item')}: {new:,} queued, {known:,} known already, {plural(conflicts, 'conflict')}, "
                f"{failed:,} cannot be asked"
            )
        if broken is not None:
            note(f"microbatch spool: {broken}")
        if stopped or broken is not None:
            note("Stopped. For the rest, run the same command again; what is queued is not queued twice.")
        if stopped:
            return console.STOPPED
        return console.SOME_FAILED if conflicts or failed or broken is not None else console.OK


async def export(spool: Spool, args: argparse.Namespace) -> int:
    """Write a line for every request that is kept, and return the exit status. After an error nothing is left of a file."""
    to_stdout = args.export == "-"
    states: Counter[State] = Counter()
    damaged = 0
    with exporting(args.export) as file:
        async for kept in spool.export():
            if args.tenant in (None, kept.name.tenant):
                line = _export_line(kept)
                file.write(msgspec.json.encode(line) + b"\n")
                states[kept.found.state] += 1
                damaged += kept.found.state == "done" and line["error"] is not None
    if args.json:
        report_json({"exported": states.total(), "damaged": damaged, "states": states})
    else:
        parts = "".join(f", {number:,} {_STATES.get(state, state)}" for state, number in states.most_common())
        exported = f"{plural(states.total(), 'request')} exported"
        (note if to_stdout else report)(f"{exported}{'' if to_stdout else f' to {args.export}'}{parts}")
        if damaged:
            note(f"{plural(damaged, 'answer')} cannot be read any more; the export has an error in place of each")
    return console.SOME_FAILED if damaged else console.OK


def _export_line(kept: Kept) -> dict[str, Any]:
    answer, error = None, kept.found.error
    if kept.found.result is not None:
        try:
            answer = Answer.decode(kept.found.result)
        except StorageError as reason:
            error = str(reason)
    return {
        "custom_id": kept.name.id,
        "tenant": kept.name.tenant,
        "state": kept.found.state,
        "output": None if answer is None else answer.value,
        "error": error,
        "deliveries": kept.deliveries,
        "usage": None if answer is None else msgspec.to_builtins(answer.usage),
        "cost_usd": None if answer is None else answer.cost_usd,
        "answered_at": None if answer is None else answer.answered_at,
        "model": None if answer is None else answer.model,
    }
