"""What the tables say against what was promised."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.overhead.entries import FLOOR, OURS
from bench.overhead.loads import LOADS
from bench.overhead.tables import cpu_ratio, wall_ratio

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bench.overhead.entries import Entry
    from bench.overhead.quiet import Quiet
    from bench.overhead.tables import Pairs

TARGETS = {"burst": (3.0, 2.0), "steady": (6.0, 4.0)}
"""By kind of load: at most so many times the floor, and what is aimed at."""

PEAK_BYTES = 2_048
NOISE = 0.15
"""Differences below this share are not told apart from noise."""


def of_times(loop: str, entries: Mapping[str, Entry], pairs: Pairs) -> Iterator[str]:
    """Say where ours stands against its targets and the quickest peer that waits for company."""
    for load in LOADS:
        own = pairs.get(load.name, {})
        if OURS not in own:
            continue
        ours, cpu = wall_ratio(own[OURS]), cpu_ratio(own[OURS])
        limit, aim = TARGETS[load.name.split()[0]]
        met = "aim met" if ours <= aim else "target met" if ours <= limit else "target MISSED"
        said = f"{loop}, {load.name}: submit is {ours:.2f}x bare futures ({cpu:.2f}x by CPU); {met} (at most {limit:g}x, aim {aim:g}x)"
        rivals = {
            name: own[name]
            for name, entry in entries.items()
            if entry.kind == "peer" and entry.windowed and name in own
        }
        if rivals:
            for word, ratio, mine in (("time", wall_ratio, ours), ("CPU", cpu_ratio, cpu)):
                best = min(rivals, key=lambda name: ratio(rivals[name]))
                said += (
                    f"; {_stand(mine, ratio(rivals[best]))} the best of {len(rivals)} windowed peers by {word}, {best}"
                )
                said += f" at {ratio(rivals[best]):.2f}x"
        yield said + "."
    busiest = [abs(wall_ratio(runs[FLOOR]) - 1) for runs in pairs.values() if FLOOR in runs]
    if busiest:
        worst = max(busiest)
        yield (
            f"{loop}: the floor against itself is off by at most {worst:.0%} in the median"
            + (", so the machine was busy and ratios are rough." if worst > NOISE else ".")
        )


def of_quiet(loop: str, quiet: Mapping[str, Quiet], pending: int) -> Iterator[str]:
    if OURS not in quiet:
        return
    ours = quiet[OURS]
    met = "target met" if ours.peak_bytes <= PEAK_BYTES else "target MISSED"
    beside = f", of which bare futures take {quiet[FLOOR].peak_bytes:,.0f}" if FLOOR in quiet else ""
    yield f"{loop}: {ours.peak_bytes:,.0f} bytes for each of {pending:,} pending requests{beside}; {met} (at most {PEAK_BYTES:,})."
    if ours.wakeups is not None:
        yield f"{loop}: {ours.wakeups:.0f} wake-ups in an idle second; target {'met' if ours.wakeups <= 0 else 'MISSED'} (0)."
    yield (
        f"{loop}: a lone request is answered after {ours.latency_ms:.1f} ms under a window of 50 ms; 20 batches over a function of 50 ms "
        f"take {ours.batches_ms:.0f} ms."
    )


def _stand(mine: float, rival: float) -> str:
    if abs(mine - rival) <= NOISE * rival:
        return "level with (within the noise)"
    return "ahead of" if mine < rival else "BEHIND"
