"""How long each way takes: microseconds an item, by the size of answers, of pieces, and of the reply.

It is processor time: nothing here waits, so it is what the work takes when nobody else wants the processor.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

from bench import timing
from bench.demux import readers
from bench.demux.replies import KINDS, LABEL, reply
from bench.report import Column, Table, met

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from bench.demux.readers import Reader
    from bench.demux.replies import Reply
    from bench.report import Report

ITEMS = 50
PIECES = (8, 40, 0)
"""Characters in a piece: about two tokens, about ten (what a busy event loop reads at once), and 0 for the whole reply."""

COUNTS = (50, 500, 5_000)
LINEAR_PIECE = 40
MOST_US = 5.0
MOST_GROWTH = 13.0
"""The targets: microseconds for a label in pieces of `LINEAR_PIECE`, and how much longer ten times the items may take."""

LEVEL = 0.05
"""Differences below this share are not told apart from noise."""

SAMPLE_S = 0.004
"""What a sample takes at least, so that the clock's resolution and one interruption do not show: short replies are repeated."""

Times = dict[str, list[float] | None]
"""Microseconds an item, one for each round, by method; None where it would take too long."""


def pieces_of(text: str, size: int) -> list[str]:
    return list(timing.chunks(text, size)) if size else [text]


def named(size: int) -> str:
    return f"{size}" if size else "whole"


class Course:
    """One reply in pieces of one size, to be taken apart by every method."""

    def __init__(self, asked: Reply, size: int, loop: asyncio.AbstractEventLoop) -> None:
        self.asked = asked
        self.pieces = pieces_of(asked.text, size)
        self._loop = loop

    def sample(self, method: type[Reader], repeats: int) -> float:
        """Return the seconds that one reply takes, the mean of *repeats*, settled futures included.

        Raises:
            AssertionError: A request got a wrong answer, or none.
        """
        count = len(self.asked.ids)
        rows = [[self._loop.create_future() for _ in range(count)] for _ in range(repeats)]
        start = time.process_time()
        for futures in rows:

            def settle(index, answer, futures=futures) -> None:
                futures[index].set_result(answer)

            reader = method(self.asked, settle)
            feed = reader.feed
            for piece in self.pieces:
                feed(piece)
            reader.close()
        took = time.process_time() - start
        for futures in rows:
            assert all(future.done() for future in futures), f"{method.__name__} left answers out"
            assert [future.result() for future in futures] == self.asked.answers, f"{method.__name__} mixed up answers"
        return took / repeats

    def expected(self, name: str) -> float:
        """Return the seconds that a method that parses all anew is expected to take: on average half of the reply each time."""
        one = Course(self.asked, 0, self._loop).sample(readers.BY_NAME[name], 1)
        parses = sum("}" in piece for piece in self.pieces) if name == "jiter, chunks with }" else len(self.pieces)
        return one * parses / 2

    def cases(self, names: list[str], longest: float, skipped: list[str]) -> dict[str, Callable[[], float]]:
        """Return what takes a sample, in microseconds an item, of each method.

        Args:
            names: The methods.
            longest: Seconds a reply; methods that parse all anew and are expected to take more are left out.
            skipped: Takes a word on each of those.
        """
        found = {}
        for name in names:
            if name in readers.REPARSING and (expected := self.expected(name)) > longest:
                skipped.append(f"{name}: {expected:.1f} s a reply expected")
                continue
            method = readers.BY_NAME[name]
            self.sample(method, 1)  # what is built once is built by now
            repeats = max(1, math.ceil(SAMPLE_S / self.sample(method, 1)))
            found[name] = partial(self._us, method, repeats)
        return found

    def _us(self, method: type[Reader], repeats: int) -> float:
        return self.sample(method, repeats) / len(self.asked.ids) * 1e6


def by_size(found: Report, loop: asyncio.AbstractEventLoop, *, rounds: int, longest: float) -> None:
    """Fill in the tables of microseconds and of ratios by answer and piece."""
    names = list(readers.BY_NAME)
    head = [Column("answer"), Column("chunk, chars")]
    times = Table(
        f"Microseconds of processor time an item, {ITEMS} items a reply, median of {rounds} alternating rounds",
        [*head, *(Column(name, ".2f") for name in names)],
    )
    against = Table(
        "Times what microbatch takes in the same round (below 1: faster than microbatch), median",
        [*head, *(Column(name, ".2f") for name in names if name != readers.OURS)],
    )
    samples = found.samples["speed"] = {}
    for kind in KINDS:
        asked = reply(kind, ITEMS, found.seed)
        for size in PIECES:
            skipped: list[str] = []
            cases = Course(asked, size, loop).cases(names, longest, skipped)
            taken: Times = {**dict.fromkeys(names), **timing.alternate(cases, rounds)}
            samples.setdefault(kind.name, {})[named(size)] = taken
            times.add(kind.name, named(size), *(_median(taken[name]) for name in names))
            ours = taken[readers.OURS]
            ratios = (
                each and statistics.median(timing.ratios(each, ours))
                for name, each in taken.items()
                if name != readers.OURS
            )
            against.add(kind.name, named(size), *ratios)
            times.notes += [f"- {kind.name}, chunks of {named(size)}: skipped {word}" for word in skipped]
    found.tables |= {"speed": times, "against_ours": against}


def by_count(found: Report, loop: asyncio.AbstractEventLoop, *, rounds: int, longest: float) -> None:
    """Fill in the table of how the time grows with the reply."""
    names = [readers.OURS, readers.STREAMED_PEER, "jiter, every chunk", readers.WHOLE]
    table = Table(
        f"Does it stay linear? Labels in chunks of {LINEAR_PIECE}: microseconds of processor time an item",
        [
            Column("method"),
            *(Column(f"{count:,} items", ".2f") for count in COUNTS),
            *(Column(f"time, {ten:,} against {one:,}", ".1f") for one, ten in itertools.pairwise(COUNTS)),
        ],
    )
    skipped: list[str] = []
    cases = {}
    for count in COUNTS:
        course = Course(reply(LABEL, count, found.seed), LINEAR_PIECE, loop)
        words: list[str] = []
        cases |= {(name, count): case for name, case in course.cases(names, longest, words).items()}
        skipped += [f"{count:,} items: skipped {word}" for word in words]
    # All sizes within one round, so that a busy minute makes no growth.
    taken = timing.alternate(cases, rounds)
    for name in names:
        times = [taken.get((name, count)) for count in COUNTS]
        growth = [
            many and statistics.median(timing.ratios(many, few)) * more / less
            for (few, less), (many, more) in itertools.pairwise(zip(times, COUNTS, strict=True))
        ]
        table.add(name, *map(_median, times), *growth)
    table.notes += [f"- {word}" for word in skipped]
    found.samples["linear"] = {name: {str(count): taken.get((name, count)) for count in COUNTS} for name in names}
    found.tables["linear"] = table


def _median(values: list[float] | None) -> float | None:
    return None if values is None else statistics.median(values)


def findings(found: Report) -> list[str]:
    """Say what the tables say."""
    speed, linear, against = (found.tables[name] for name in ("speed", "linear", "against_ours"))
    names = [column.name for column in against.columns]
    whole = names.index(readers.WHOLE)
    said = [
        _against(name, {(row[0], row[1]): row[names.index(name)] for row in against.rows})
        for name in (readers.STREAMED_PEER, readers.CHECKED_PEER)
    ]
    costs = [1 / row[whole] for row in against.rows]
    said.append(
        f"Decoding the whole reply once with msgspec takes less: microbatch takes {min(costs):.1f} to {max(costs):.1f} times that; "
        "it is what answering before the reply is whole, and surviving damage, cost."
    )
    us = next(row[2] for row in speed.rows if row[:2] == [LABEL.name, named(LINEAR_PIECE)])
    row = next(row for row in linear.rows if row[0] == readers.OURS)
    growth = [cell for cell in row[1 + len(COUNTS) :] if cell is not None]
    said.append(
        f"Target of at most {MOST_US:g} us for a label in chunks of {LINEAR_PIECE}: {met(us <= MOST_US)} ({us:.2f} us). Ten times the items at most "
        f"{MOST_GROWTH:g} times as long: {met(max(growth) <= MOST_GROWTH)} (at most {max(growth):.1f} times)."
    )
    few, many = (
        next(row for row in linear.rows if row[0] == name)[1 + len(COUNTS)]
        for name in (readers.OURS, "jiter, every chunk")
    )
    if many is not None:
        said.append(
            f"Parsing all anew is quadratic: with {COUNTS[1]} items for {COUNTS[0]} jiter on every chunk takes {many:.0f} times as "
            f"long, microbatch {few:.0f} times."
        )
    return said


def _against(name: str, ratios: dict[tuple[str, str], float]) -> str:
    """Say with what microbatch is slower and faster than *name*, from how many times its own time that one takes."""
    said: dict[str, list[str]] = {"slower": [], f"level to within {LEVEL:.0%}": [], "faster": []}
    slower, level, faster = said.values()
    for (kind, piece), ratio in ratios.items():
        what = f"{kind} {'whole' if piece == named(0) else f'in chunks of {piece}'}"
        if abs(ratio - 1) <= LEVEL:
            level.append(what)
        elif ratio < 1:
            slower.append(f"{what} ({1 / ratio:.1f}x)")
        else:
            faster.append(f"{what} ({ratio:.1f}x)")
    return (
        f"Against {name}: "
        + "; ".join(f"{word} with {', '.join(whats) or 'none'}" for word, whats in said.items())
        + "."
    )
