"""The way into a spool and out of it for files: JSON Lines."""

from __future__ import annotations

import os
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import msgspec

from microbatch.cli import console
from microbatch.cli.answers import NotWritten
from microbatch.cli.console import NotHeard, UsageError, note, plural, tell
from microbatch.cli.failures import Failures
from microbatch.cli.plan import read_questions
from microbatch.cli.questions import payload_of
from microbatch.cli.reading import BadLine, Input, InputChanged, numbered
from microbatch.cli.stopping import stoppable
from microbatch.errors import ConfigError, StorageError
from microbatch.spool.payload import Answer
from microbatch.spool.records import Name

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from microbatch.spool.records import Item, Kept, PutOutcome, Spool, State

AT_ONCE: Final = 500
"""Requests put in one transaction."""


class Put:
    """Queues a request for every line of a file.

    Args:
        args: The flags of `spool`.

    Raises:
        UsageError: Something is wrong with the flags or the file.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._questions = read_questions(args, needs_model=False)
        self._source = Input(args.put, id_field=args.id_field)
        self._survey = self._source.survey(self._questions.fields)
        self._came_of_it: Counter[PutOutcome] = Counter()
        self._rejected = 0
        self._failures = Failures()

    async def go(self, spool: Spool) -> int:
        """Queue them, tell how it went and return the exit status."""
        stopped, broken = True, None
        with stoppable():
            try:
                items = self._items()
                while some := list(islice(items, AT_ONCE)):
                    outcomes = await spool.put([item for _, item in some])
                    for (line, _), outcome in zip(some, outcomes, strict=True):
                        self._note(line, outcome)
            except (InputChanged, OSError, StorageError) as error:
                broken = error
            stopped = False
        return self._tell(stopped=stopped, broken=broken)

    def _items(self) -> Iterator[tuple[int, Item]]:
        """Yield what is to be put, each with the number of its line."""
        for line, request in numbered(self._source, self._survey, self._questions, (), self._reject):
            name = Name(self._args.tenant, request.id or "")
            try:
                payload = payload_of(request, self._args.model)
            except ConfigError as error:
                self._reject(BadLine(line, name.id, str(error)), name.id)
            else:
                yield line, payload.item(name)

    def _reject(self, line: BadLine, _name: str) -> None:
        self._failures.add(line.problem, str(line.number), f"{self._source.path}, line ")
        self._rejected += 1

    def _note(self, line: int, outcome: PutOutcome) -> None:
        self._came_of_it[outcome] += 1
        if outcome == "conflict":
            problem = "the spool holds another request under this id; it stays, and this one was not queued"
            self._failures.add(problem, str(line), f"{self._source.path}, line ")

    def _tell(self, *, stopped: bool, broken: Exception | None) -> int:
        for line in self._failures.told():
            note(line)
        new, known, conflicts = (self._came_of_it[outcome] for outcome in ("new", "known", "conflict"))
        items = self._survey.items
        if self._args.json:
            figures = {"items": items, "new": new, "known": known, "conflicts": conflicts, "failed": self._rejected}
            tell(msgspec.json.encode(figures).decode())
        else:
            tell(
                f"{plural(items, 'item')}: {new:,} queued, {known:,} known already, {plural(conflicts, 'conflict')}, "
                f"{self._rejected:,} cannot be asked"
            )
        if broken is not None:
            note(f"microbatch spool: {broken}")
        if stopped or broken is not None:
            note("Stopped. For the rest, run the same command again; what is queued is not queued twice.")
        if stopped:
            return console.STOPPED
        return console.SOME_FAILED if conflicts or self._rejected or broken is not None else console.OK


class Export:
    """Writes a line for every request that is kept.

    Args:
        args: The flags of `spool`.

    Raises:
        UsageError: The file exists already.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        if args.export == "-":
            if args.json:
                raise UsageError("--export - fills stdout with the export; --json has no place there")
        elif Path(args.export).exists():
            raise UsageError(f"{args.export!r} exists already; choose another name, or - for stdout")

    async def go(self, spool: Spool) -> int:
        """Write them, tell how many and return the exit status.

        Raises:
            NotWritten: The disk is full, or the like; nothing is left of the file.
            StorageError: The spool cannot be read to its end; nothing is left of the file.
            UsageError: The file cannot be written.
        """
        states: Counter[State] = Counter()
        damaged = 0
        with _written(self._args.export) as file:
            async for kept in spool.export():
                if self._args.tenant in (None, kept.name.tenant):
                    line = export_line(kept)
                    file.write(msgspec.json.encode(line) + b"\n")
                    states[kept.found.state] += 1
                    damaged += kept.found.state == "done" and line["error"] is not None
        self._tell(states, damaged)
        return console.SOME_FAILED if damaged else console.OK

    def _tell(self, states: Counter[State], damaged: int) -> None:
        if self._args.json:
            tell(msgspec.json.encode({"exported": states.total(), "damaged": damaged, "states": states}).decode())
            return
        parts = "".join(f", {number:,} {_SHOWN.get(state, state)}" for state, number in states.most_common())
        where = "" if self._args.export == "-" else f" to {self._args.export}"
        write = note if self._args.export == "-" else tell
        write(f"{plural(states.total(), 'request')} exported{where}{parts}")
        if damaged:
            note(f"{plural(damaged, 'answer')} cannot be read any more; the export has an error in place of each")


_SHOWN: Final[dict[State, str]] = {"leased": "with a worker", "in_job": "in a batch job", "done": "answered"}


def export_line(kept: Kept) -> dict[str, Any]:
    """Return what an export says of a request."""
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


@contextmanager
def _written(path: str) -> Iterator[BinaryIO]:
    """Open *path* for writing; it gets its name when all is on the disk. "-" is stdout.

    Raises:
        NotHeard: It is stdout, which takes no more.
        NotWritten: It cannot be written to its end.
        UsageError: It cannot be made.
    """
    if path == "-":
        try:
            yield sys.stdout.buffer
            sys.stdout.buffer.flush()
        except OSError as error:
            console.mute(sys.stdout)
            raise NotHeard("cannot write to stdout") from error
        return
    draft = Path(path + ".new")
    try:
        file = draft.open("wb")
    except OSError as error:
        raise UsageError(f"cannot write {path!r}: {error.strerror}") from None
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise NotWritten(f"cannot write {path!r}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)
