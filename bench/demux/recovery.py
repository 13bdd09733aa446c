"""What each way makes of damaged replies, and how late answers are in sound ones."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench.demux import readers
from bench.demux.replies import ITEMS, KINDS, damaged, reply
from bench.demux.speed import ITEMS as MANY
from bench.demux.speed import pieces_of
from bench.report import Column, Table

if TYPE_CHECKING:
    from bench.demux.readers import Reader
    from bench.demux.replies import Reply
    from bench.report import Report

PIECE = 8
OTHER_PIECES = (1, 2, 3, 5, 13, 40, 0)
"""How a reply is cut must not change what microbatch makes of it."""

LAG_PIECE = 40
METHODS = {**readers.BY_NAME, "json.loads, by position": readers.ByPosition}


def outcome(method: type[Reader], asked: Reply, size: int) -> tuple[int, int, int]:
    """Return how many requests got their right answer, how many a wrong one, and how many got any before the reply ended."""
    got = {}
    reader = method(asked, got.__setitem__)
    early = 0
    try:
        for piece in pieces_of(asked.text, size):
            reader.feed(piece)
        early = len(got)
        reader.close()
    except Exception:  # noqa: BLE001 - each library has errors of its own; what was answered before stands
        early = early or len(got)
    right = sum(answer == asked.answers[index] for index, answer in got.items())
    return right, len(got) - right, early


def by_damage(found: Report) -> None:
    """Fill in the table of what is recovered."""
    names = list(METHODS)
    table = Table(
        f"Answers recovered of {ITEMS}, chunks of {PIECE} characters; +n: n requests got a WRONG answer, or one of the wrong type",
        [Column("what is wrong with the reply"), *(Column(name) for name in names)],
        notes=[
            "What microbatch holds until the reply ends counts as recovered where it is accepted then. What is missing is asked again.",
            "The others are used as their documentation shows; fences and prose could be stripped before, by code of one's own.",
        ],
    )
    samples = found.samples["recovery"] = {}
    for what, asked in damaged(found.seed).items():
        counts = samples[what] = {name: outcome(method, asked, PIECE) for name, method in METHODS.items()}
        for size in OTHER_PIECES:
            other = outcome(readers.Microbatch, asked, size)
            assert other[:2] == counts[readers.OURS][:2], f"{what}: pieces of {size} change the answers"
        table.add(what, *(f"{right}" + (f" +{wrong}" if wrong else "") for right, wrong, _ in counts.values()))
    found.tables["recovery"] = table


def by_lag(found: Report) -> None:
    """Fill in the table of how late an answer is handed out."""
    table = Table(
        f"When answers come, {MANY} items, chunks of {LAG_PIECE} characters",
        [
            Column("method"),
            Column("answer"),
            Column("before the last chunk", "d"),
            Column("mean chunks late", ".1f"),
            Column("most chunks late", "d"),
        ],
        notes=["Late: chunks after the one that held the answer's closing brace."],
    )
    for kind in KINDS[:2]:
        asked = reply(kind, MANY, found.seed)
        pieces = pieces_of(asked.text, LAG_PIECE)
        ends = _ends(asked)
        for name, method in readers.BY_NAME.items():
            at = _answered_at(method, asked, pieces)
            late = [mine - end // LAG_PIECE for mine, end in zip(at, ends, strict=True)]
            table.add(name, kind.name, sum(mine < len(pieces) - 1 for mine in at), statistics.mean(late), max(late))
    found.tables["lag"] = table


def _answered_at(method: type[Reader], asked: Reply, pieces: list[str]) -> list[int]:
    """Return the chunk with which each answer came; the end of the stream counts as one chunk more."""
    at: dict[int, int] = {}
    current = 0
    reader = method(asked, lambda index, _: at.setdefault(index, current))
    for piece in pieces:
        reader.feed(piece)
        current += 1
    reader.close()
    return [at[index] for index in range(len(asked.ids))]


def _ends(asked: Reply) -> list[int]:
    """Return where each element's closing brace stands."""
    starts = [asked.text.index(f'{{"id":"{name}"') for name in asked.ids]
    return [start - 2 for start in starts[1:]] + [len(asked.text) - len("]}") - 1]


def findings(found: Report) -> list[str]:
    """Say what the tables say."""
    samples = found.samples["recovery"]
    all_of = ITEMS * len(samples)
    sums = {name: [sum(counts[name][at] for counts in samples.values()) for at in (0, 1)] for name in METHODS}
    peers = {name: pair for name, pair in sums.items() if name != readers.OURS}
    best = max(peers, key=lambda name: peers[name][0])
    right, wrong = sums[readers.OURS]
    where = [what for what, counts in samples.items() if counts[readers.OURS][1]]
    behind: dict[str, list[str]] = {}
    for what, counts in samples.items():
        for name in peers:
            if counts[name][0] > counts[readers.OURS][0]:
                behind.setdefault(name, []).append(what)
    said = [
        (
            f"Over the {len(samples)} replies microbatch recovers {right} of {all_of} answers with {wrong} wrong ones; "
            f"the best of the others, {best}, {peers[best][0]} with {peers[best][1]} wrong ones."
        ),
        f"Wrong answers of microbatch come from: {', '.join(where) or 'none of them'}"
        + ("; where a model writes two valid ids the wrong way round, no check of ids can see it." if where else "."),
        *(
            f"{name} gets more right answers than microbatch from: {', '.join(whats)}; in all it hands out {sums[name][1]} wrong ones. "
            "What microbatch does not trust it asks again."
            for name, whats in behind.items()
        ),
    ]
    lag = [row for row in found.tables["lag"].rows if row[0] == readers.OURS]
    early = " and ".join(f"{row[2]} of {MANY} ({row[1]}, at most {row[4]} chunks late)" for row in lag)
    said.append(
        f"Before the reply's last chunk microbatch has answered {early}; a whole-reply decode has answered none."
    )
    return said
