"""The cost of taking a combined reply apart while it streams in, and what is recovered of a damaged one.

Replies are made up: labels, and texts full of quotes, braces, escapes and emoji. Every method settles one future for each answer,
and every sample is checked against the right answers outside the clock. Times are processor time.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from bench.benchmark import Option
from bench.demux.readers import CHECKED_PEER, METHODS, OURS, REPARSING, STREAMED_PEER, WHOLE
from bench.demux.replies import KINDS, LABEL, damaged, reply
from bench.report import Run, Table, met
from bench.timing import alternate, median, ratio

if TYPE_CHECKING:
    import argparse

    from bench.demux.replies import Reply

QUESTION = "What does taking a combined reply apart as it streams cost, and what is recovered of damaged ones?"
COMPARED = ["ijson", "jiter", "partial-json-parser", "msgspec"]
OPTIONS = {
    "rounds": Option(int, 15, 5, "alternating rounds"),
    "longest": Option(float, 3.0, 0.05, "seconds for a reply; a method that is expected to take longer is skipped"),
}

ITEMS = 50
PIECES = (8, 40, 0)
"""Characters in a chunk: about two tokens, about ten (what a busy event loop reads at once), and 0 for the whole reply."""

LINEAR_ITEMS, LINEAR_PIECE = 5_000, 40
MOST_US, MOST_GROWTH = 5.0, 130.0
"""Targets: microseconds for a label in chunks of `LINEAR_PIECE`, and how much longer a hundred times the items may take."""

SAMPLE_S = 0.004
"""Least duration of a sample: short replies are repeated, so that the clock's resolution does not show."""

DAMAGE_PIECE, OTHER_PIECES = 8, (1, 2, 3, 5, 13, 40, 0)
"""The answers of microbatch must not depend on how a reply is cut."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    speed, loop = {}, asyncio.new_event_loop()  # never runs: futures need one
    gc.collect()
    gc.freeze()  # imported modules are not scanned before every sample
    try:
        replies = [(kind.name, size, reply(kind, ITEMS, options.seed)) for kind in KINDS for size in PIECES]
        replies.append((f"{LINEAR_ITEMS:,} labels", LINEAR_PIECE, reply(LABEL, LINEAR_ITEMS, options.seed)))
        for name, size, asked in replies:
            cases = {}
            for method in METHODS:
                once = partial(sample, method, asked, size, loop)
                if (
                    method in REPARSING
                    and sample(method, asked, 0, loop, 1) * len(asked.text) / (size or 1e9) / 2 > options.longest
                ):
                    continue  # each chunk takes half of the whole reply's time on average
                once(1)  # builds what is built once
                cases[method] = partial(once, max(1, math.ceil(SAMPLE_S / once(1))))
            speed.setdefault(name, {})[str(size)] = alternate(cases, options.rounds)
    finally:
        gc.unfreeze()
        loop.close()
    return {"speed": speed, "recovery": recovery(options.seed)}


def sample(name: str, asked: Reply, size: int, loop: asyncio.AbstractEventLoop, repeats: int) -> float:
    """Return the seconds that one reply in chunks of *size* takes, the mean of *repeats*, settled futures included.

    Raises:
        AssertionError: A request got a wrong answer, or none.
    """
    pieces, method = pieces_of(asked.text, size), METHODS[name]
    rows = [[loop.create_future() for _ in asked.ids] for _ in range(repeats)]
    start = time.process_time()
    for futures in rows:
        feed, close = method(
            asked.ids, asked.output_type, lambda index, answer, to=futures: to[index].set_result(answer)
        )
        for piece in pieces:
            feed(piece)
        close()
    took = time.process_time() - start
    for futures in rows:
        assert [future.result() for future in futures] == asked.answers, f"{name} mixed up answers"
    return took / repeats


def pieces_of(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)] if size else [text]


def recovery(seed: int) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the numbers of right and of wrong answers, by damage and method."""
    found = {}
    for damage, asked in damaged(seed).items():
        found[damage] = {name: recovered(name, asked, DAMAGE_PIECE) for name in METHODS}
        for size in OTHER_PIECES:
            other = recovered(OURS, asked, size)
            assert other == found[damage][OURS], f"{damage}: chunks of {size} change the answers"
    return found


def recovered(name: str, asked: Reply, size: int) -> tuple[int, int]:
    got: dict[int, Any] = {}
    feed, close = METHODS[name](asked.ids, asked.output_type, got.__setitem__)
    try:
        for piece in pieces_of(asked.text, size):
            feed(piece)
        close()
    except Exception:  # noqa: BLE001 - each library has errors of its own; answers given before it stand
        pass
    right = sum(answer == asked.answers[index] for index, answer in got.items())
    return right, len(got) - right


def tables(run: Run) -> dict[str, Table]:
    speed = Table(
        f"Microseconds of processor time an item, {ITEMS} items in a SIMULATED reply, median of {run.options['rounds']} alternating rounds",
        " | ".join(["answer", "chunk, chars", *(f"{name} {{:.2f}}" for name in METHODS)]),
        f"-: skipped, expected to take more than {run.options['longest']:g} s for a reply.",
    )
    for kind, sizes in run.samples["speed"].items():
        items = ITEMS if kind in {one.name for one in KINDS} else LINEAR_ITEMS
        for size, taken in sizes.items():
            times = [median(taken[name]) / items * 1e6 if name in taken else None for name in METHODS]
            speed.add(kind, size if size != "0" else "whole", *times)
    damage = Table(
        f"Answers recovered of 10 from a SIMULATED reply, chunks of {DAMAGE_PIECE} characters; +n: n WRONG answers, or of the wrong type",
        " | ".join(["damage", *METHODS]),
        "What microbatch holds until the reply ends counts as recovered where it is accepted then; what is missing is asked again. The others "
        "are used as their documentation shows; fences and prose could be stripped before by code of one's own.",
    )
    for what, counts in run.samples["recovery"].items():
        damage.add(what, *(f"{right}" + (f" +{wrong}" if wrong else "") for right, wrong in map(counts.get, METHODS)))
    return {"speed": speed, "recovery": damage}


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    rows, samples = tables["speed"].by("answer", "chunk, chars"), run.samples["recovery"]
    found = []
    for name in (STREAMED_PEER, CHECKED_PEER, WHOLE):
        ratios = [row[OURS] / row[name] for row in rows.values()]
        found.append(f"microbatch takes {min(ratios):.2f} to {max(ratios):.2f} times the time of {name}.")
    many = run.samples["speed"][f"{LINEAR_ITEMS:,} labels"][str(LINEAR_PIECE)][OURS]
    growth = ratio(many, run.samples["speed"][LABEL.name][str(LINEAR_PIECE)][OURS])
    us = rows[LABEL.name, str(LINEAR_PIECE)][OURS]
    sums = {name: [sum(counts[name][at] for counts in samples.values()) for at in (0, 1)] for name in METHODS}
    right, wrong = sums.pop(OURS)
    best = max(sums, key=lambda name: sums[name][0])
    where = [what for what, counts in samples.items() if counts[OURS][1]]
    return [
        *found,
        f"A label in chunks of {LINEAR_PIECE} takes {us:.2f} us; target of at most {MOST_US:g} {met(us <= MOST_US)}. {LINEAR_ITEMS // ITEMS} times "
        f"the items take {growth:.0f} times as long; target of at most {MOST_GROWTH:g} {met(growth <= MOST_GROWTH)}.",
        f"Over the {len(samples)} damaged replies microbatch recovers {right} of {10 * len(samples)} answers with {wrong} wrong ones; the best "
        f"of the others, {best}, {sums[best][0]} with {sums[best][1]} wrong ones.",
        f"Wrong answers of microbatch come from: {', '.join(where) or 'none'}"
        + ("; no check of ids can see that a model has exchanged two valid ids." if where else "."),
    ]
