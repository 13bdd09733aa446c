"""Files that go into a spool, and come out of it: JSON Lines."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import msgspec

from microbatch.cli import console
from microbatch.cli.console import StdoutError, UsageError, note, plural, report, report_json
from microbatch.cli.input import BadLine, Input, InputChanged, payload_of
from microbatch.cli.output import NotWritten, replacing
from microbatch.cli.plan import read_questions
from microbatch.cli.stopping import stoppable
from microbatch.cli.summary import Failures
from microbatch.errors import ConfigError, StorageError
from microbatch.spool.payload import Answer
from microbatch.spool.records import Name

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from microbatch.spool.records import Item, Kept, PutOutcome, Spool, State

AT_ONCE: Final = 500
"""Requests put in one transaction."""

_STATES: Final[dict[State, str]] = {"leased": "with a worker", "in_job": "in a batch job", "done": "answered"}


class Put:
    """Queues a request for every line of a file.

    Args:
        args: The flags of `spool`.

    Raises:
        UsageError: A flag or the file is wrong.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._source = Input(args.put, read_questions(args, needs_model=False), id_field=args.id_field)
        self._outcomes: Counter[PutOutcome] = Counter()
        self._rejected = 0
        self._failures = Failures()

    async def go(self, spool: Spool) -> int:
        """Queue them, report and return the exit status."""
        stopped, broken = True, None
        with stoppable():
            try:
                items = self._items()
                while some := list(islice(items, AT_ONCE)):
                    outcomes = await spool.put([item for _, item in some])
                    for (number, _), outcome in zip(some, outcomes, strict=True):
                        self._count(number, outcome)
            except (InputChanged, OSError, StorageError) as error:
                broken = error
            stopped = False
        return self._report(stopped=stopped, broken=broken)

    def _items(self) -> Iterator[tuple[int, Item]]:
        """Yield the number of each line and the request that is put for it."""
        for row in self._source.requests():
            if isinstance(row, BadLine):
                self._reject(row.number, row.problem)
                continue
            number, request = row
            try:
                payload = payload_of(request, self._args.model)
            except ConfigError as error:
                self._reject(number, str(error))
            else:
                yield number, payload.item(Name(self._args.tenant, request.id or ""))

    def _reject(self, number: int, problem: str) -> None:
        self._failures.add(problem, str(number), f"{self._source.path}, line ")
        self._rejected += 1

    def _count(self, number: int, outcome: PutOutcome) -> None:
        self._outcomes[outcome] += 1
        if outcome == "conflict":
            problem = "the spool holds another request under this id; it stays, and this one was not queued"
            self._failures.add(problem, str(number), f"{self._source.path}, line ")

    def _report(self, *, stopped: bool, broken: Exception | None) -> int:
        for line in self._failures.lines():
            note(line)
        new, known, conflicts = (self._outcomes[outcome] for outcome in ("new", "known", "conflict"))
        items, rejected = self._source.items, self._rejected
        if self._args.json:
            report_json({"items": items, "new": new, "known": known, "conflicts": conflicts, "failed": rejected})
        else:
            report(
                f"{plural(items, 'item')}: {new:,} queued, {known:,} known already, {plural(conflicts, 'conflict')}, "
                f"{rejected:,} cannot be asked"
            )
        if broken is not None:
            note(f"microbatch spool: {broken}")
        if stopped or broken is not None:
            note("Stopped. For the rest, run the same command again; what is queued is not queued twice.")
        if stopped:
            return console.STOPPED
        return console.SOME_FAILED if conflicts or rejected or broken is not None else console.OK


async def export(spool: Spool, args: argparse.Namespace) -> int:
    """Write a line for every request that is kept, and return the exit status. After an error nothing is left of a file.

    Raises:
        NotWritten: The file cannot be written to its end.
        StdoutError: Stdout cannot be written.
        StorageError: The spool cannot be read to its end.
        UsageError: The file cannot be made.
    """
    to_stdout = args.export == "-"
    opened = False
    try:
        with nullcontext(sys.stdout.buffer) if to_stdout else replacing(Path(args.export)) as file:
            opened = True
            states, damaged = await _write_lines(spool, file, args.tenant)
            file.flush()
    except OSError as error:
        if to_stdout:
            console.mute(sys.stdout)
            raise StdoutError("cannot write to stdout") from error
        kind = NotWritten if opened else UsageError
        raise kind(f"cannot write {args.export!r}: {error.strerror}") from error
    if args.json:
        report_json({"exported": states.total(), "damaged": damaged, "states": states})
    else:
        parts = "".join(f", {number:,} {_STATES.get(state, state)}" for state, number in states.most_common())
        exported = f"{plural(states.total(), 'request')} exported"
        (note if to_stdout else report)(f"{exported}{'' if to_stdout else f' to {args.export}'}{parts}")
        if damaged:
            note(f"{plural(damaged, 'answer')} cannot be read any more; the export has an error in place of each")
    return console.SOME_FAILED if damaged else console.OK


async def _write_lines(spool: Spool, file: BinaryIO, tenant: str | None) -> tuple[Counter[State], int]:
    """Write the requests of *tenant*, or of all; return how many there are of each state, and how many answers are damaged."""
    states: Counter[State] = Counter()
    damaged = 0
    async for kept in spool.export():
        if tenant in (None, kept.name.tenant):
            line = _export_line(kept)
            file.write(msgspec.json.encode(line) + b"\n")
            states[kept.found.state] += 1
            damaged += kept.found.state == "done" and line["error"] is not None
    return states, damaged


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
    }
