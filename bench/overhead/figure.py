"""The figure: how many times bare futures each way to batch costs, all at once and one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.patches import Patch

from bench import plot
from bench.overhead.entries import FLOOR
from bench.overhead.findings import TARGETS
from bench.peers.floors import FLOORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.report import Cell, Report, Table

SHOWN = {"burst 32": "20,000 at once, batches of 32", "steady": "256 workers in a loop, batches of 32"}
OURS, WAITS, DOES_NOT, BARE = "microbatch", "peer that waits for company", "peer that does not", "floor"
COLORS = {OURS: plot.OURS, WAITS: plot.OTHERS[0], DOES_NOT: plot.OTHERS[1], BARE: plot.MUTED}


def draw(found: Report) -> Figure:
    figure, axes = plot.panels(len(SHOWN), width=6.2, height=4.4)
    for axis, (load, title) in zip(axes, SHOWN.items(), strict=True):
        _bars(axis, found.tables["asyncio"], load)
        limit, aim = TARGETS[load.split()[0]]
        lines = [
            axis.axvline(1, color="black", linewidth=1, label="bare futures"),
            axis.axvline(aim, color=plot.OURS, linestyle=":", label=f"aim of microbatch, {aim:g}"),
            axis.axvline(limit, color=plot.OURS, linestyle="--", label=f"target of microbatch, {limit:g}"),
        ]
        axis.set(title=title, xlabel="wall time, times that of bare futures")
        axis.margins(x=0.08)
        axis.legend(
            handles=[*(Patch(color=color, label=kind) for kind, color in COLORS.items()), *lines],
            loc="upper right",
            fontsize=7,
        )
    figure.suptitle("What submit costs, asyncio (peers carry an integer, microbatch two chat messages)")
    return figure


def _bars(axis: Axes, table: Table, load: str) -> None:
    """Draw one bar for each row, the cheapest on top."""
    at = [column.name for column in table.columns].index(f"{load}: x floor")
    rows = sorted((row for row in table.rows if row[at] is not None), key=lambda row: row[at], reverse=True)
    names, values = [str(row[0]) for row in rows], [float(row[at]) for row in rows]
    bars = axis.barh(names, values, color=[COLORS[_kind(row)] for row in rows])
    over_lines = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axis.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=7, bbox=over_lines)
    axis.grid(visible=False, axis="y")


def _kind(row: list[Cell]) -> str:
    if str(row[0]).startswith(OURS):
        return OURS
    if str(row[0]).removesuffix(", same work") in (FLOOR, *FLOORS):
        return BARE
    return WAITS if row[1] else DOES_NOT
