"""What the tables say against what was promised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.overhead.entries import FLOOR, LARGE, OURS
from bench.overhead.loads import BARE, LOADS
from bench.overhead.tables import cpu_ratio, filling, wall_ratio
from bench.report import met

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bench.overhead.entries import Entry
    from bench.overhead.loads import Pair
    from bench.overhead.quiet import Quiet
    from bench.overhead.tables import Pairs

    Runs = Mapping[str, list[Pair]]
    Ratio = Callable[[Sequence[Pair]], float]

TARGETS = {"burst": (3.0, 2.0), "steady": (6.0, 4.0)}
"""By kind of load: at most so many times the floor, and what is aimed at."""

AHEAD = 1.3
"""On the same work, at least so many times ahead of every peer that waits for company."""

PEAK_BYTES = 2_355
"""2.3 KB."""

AT_ONCE = "aiodataloader, same work"
NOISE = 0.15
"""Differences below this share are not told apart from noise."""


def of_times(loop: str, entries: Mapping[str, Entry], pairs: Pairs) -> Iterator[str]:
    """Say where ours stands against its targets, and against each peer that waits for company."""
    for load in LOADS:
        runs = pairs.get(load.name, {})
        if OURS in runs:
            yield _verdict(f"{loop}, {load.name}", TARGETS[load.name.split()[0]], runs[OURS])
            peers = [
                name for name, entry in entries.items() if entry.kind == "peer" and entry.windowed and name in runs
            ]
            equal = [name for name in peers if entries[name].same_work]
            yield from _standing(f"{loop}, {load.name}", runs, [name for name in peers if name not in equal])
            yield from _on_the_same_work(f"{loop}, {load.name}", runs, equal)
    yield from _asides(loop, entries, pairs)


def _verdict(where: str, target: tuple[float, float], own: Sequence[Pair]) -> str:
    ratio, (limit, aim) = wall_ratio(own), target
    verdict = "aim met" if ratio <= aim else "target met, aim missed" if ratio <= limit else "target MISSED"
    return (
        f"{where}: submit takes {ratio:.2f} times what bare futures take; {verdict} (at most {limit:g}, aim {aim:g})."
    )


def _standing(where: str, runs: Runs, rivals: Sequence[str]) -> Iterator[str]:
    if not rivals:
        return
    by_time, by_cpu = _not_behind(runs, rivals, wall_ratio), _not_behind(runs, rivals, cpu_ratio)
    if by_time or by_cpu:
        clear = "ahead of all"
        said = f"NOT ahead of every windowed peer: by time {by_time or clear}; by processor time {by_cpu or clear}"
    else:
        best = min(rivals, key=lambda name: wall_ratio(runs[name]))
        said = f"ahead of every windowed peer measured; the best of {len(rivals)} is {_named(runs, best, wall_ratio)}"
    yield f"{where}: {said}."


def _on_the_same_work(where: str, runs: Runs, rivals: Sequence[str]) -> Iterator[str]:
    """Say how far ahead ours is of peers whose batch function composes the same prompt and reads the same reply."""
    ours = wall_ratio(runs[OURS])
    if rivals:
        nearest = min(rivals, key=lambda name: wall_ratio(runs[name]))
        ahead = wall_ratio(runs[nearest]) / ours
        yield (
            f"{where}, on the same work: submit is at least {ahead:.2f} times as fast as each of {len(rivals)} peers that wait for "
            f"company; target {met(ahead >= AHEAD)} (at least {AHEAD:g}). The nearest is {_named(runs, nearest, wall_ratio)}."
        )
    if AT_ONCE in runs:
        times = ours / wall_ratio(runs[AT_ONCE])
        yield f"{where}, on the same work: submit takes {times:.2f} times what {AT_ONCE} takes, which never waits for company."


def _not_behind(runs: Runs, rivals: Sequence[str], ratio: Ratio) -> str:
    """Return of whom ours is not clearly ahead, "" if it is of all."""
    ours = ratio(runs[OURS])
    ranked = sorted(rivals, key=lambda name: ratio(runs[name]))
    ahead = [name for name in ranked if ratio(runs[name]) < ours / (1 + NOISE)]
    level = [name for name in ranked if ours / (1 + NOISE) <= ratio(runs[name]) <= ours * (1 + NOISE)]
    said = (("BEHIND", ahead), (f"level, to within {NOISE:.0%}, with", level))
    return ", ".join(
        f"{word} {', '.join(_named(runs, name, ratio) for name in names)}" for word, names in said if names
    )


def _named(runs: Runs, name: str, ratio: Ratio) -> str:
    items = filling(runs[name])
    alone = ", in batches of one" if items is not None and items < 2 else ""
    return f"{name} ({ratio(runs[name]):.2f}{alone})"


def _asides(loop: str, entries: Mapping[str, Entry], pairs: Pairs) -> Iterator[str]:
    """Say what a reader should know before believing the rest."""
    steady = pairs.get(LOADS[-1].name, {})
    loaders = [
        name for name, entry in entries.items() if entry.kind == "peer" and not (entry.windowed or entry.same_work)
    ]
    if told := [f"{name} at {wall_ratio(steady[name]):.2f}" for name in loaders if name in steady]:
        yield f"{loop}, steady: what does not wait for company costs least: {', '.join(told)}."
    if LARGE in steady:
        yield (
            f"{loop}, steady: items of 1 KB under the default budget, whose tokens have to be counted, take "
            f"{wall_ratio(steady[LARGE]):.1f} times what bare futures take; there is no target for them."
        )
    if own := pairs.get(BARE.name, {}).get(OURS):
        yield (
            f"{loop}, burst 32: without asyncio.gather, whose work is in the figures of all, submit takes "
            f"{wall_ratio(own):.2f} times what bare futures take."
        )
    worst = max(abs(wall_ratio(runs[FLOOR]) - 1) for runs in pairs.values() if FLOOR in runs)
    busy = ", so the machine was busy, and ratios are rough" if worst > NOISE else ""
    yield f"{loop}: the floor against itself is off by at most {worst:.0%} in the median{busy}."


def of_quiet(loop: str, quiet: Mapping[str, Quiet], pending: int) -> Iterator[str]:
    if OURS not in quiet:
        return
    ours = quiet[OURS]
    beside = f", of which bare futures take {quiet[FLOOR].peak_bytes:,.0f}" if FLOOR in quiet else ""
    yield f"{loop}: {ours.peak_bytes:,.0f} bytes for each of {pending:,} pending requests{beside}; target {met(ours.peak_bytes <= PEAK_BYTES)} (at most {PEAK_BYTES:,})."
    if ours.wakeups is not None:
        yield f"{loop}: {ours.wakeups:.0f} wake-ups in an idle second; target {met(ours.wakeups <= 0)} (0)."
    yield (
        f"{loop}: a lone request is answered after {ours.latency_ms:.1f} ms under a window of 50 ms; 20 batches over a function of 50 ms "
        f"take {ours.batches_ms:.0f} ms."
    )
