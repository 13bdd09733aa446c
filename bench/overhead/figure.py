"""The figure: how many times bare futures each way to batch costs, all at once and one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import plot
from bench.overhead.findings import TARGETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.report import Report, Table

SHOWN = {"burst 32": "20,000 at once, batches of 32", "steady": "256 workers in a loop, batches of 32"}


def draw(found: Report) -> Figure:
    figure, axes = plot.panels(len(SHOWN), width=6.2, height=4.4)
    for axis, (load, title) in zip(axes, SHOWN.items(), strict=True):
        _bars(axis, found.tables["asyncio"], load)
        limit, aim = TARGETS[load.split()[0]]
        axis.axvline(1, color="black", linewidth=1, label="bare futures")
        axis.axvline(aim, color=plot.MUTED, linestyle=":", label=f"aim of microbatch, {aim:g}x")
        axis.axvline(limit, color=plot.OURS, linestyle="--", label=f"its target, {limit:g}x")
        axis.set_title(title)
        axis.set_xlabel("wall time, times that of bare futures")
        axis.legend(loc="lower right", fontsize=7)
    figure.suptitle("What submit costs, asyncio (peers carry an integer, microbatch two chat messages)")
    return figure


def _bars(axis: Axes, table: Table, load: str) -> None:
    at = [column.name for column in table.columns].index(f"{load}: x floor")
    rows = [(str(row[0]), float(row[at])) for row in reversed(table.rows) if row[at] is not None]
    names, values = zip(*rows, strict=True)
    colors = [plot.OURS if name.startswith("microbatch") else plot.OTHERS[0] for name in names]
    for bar, value in zip(axis.barh(names, values, color=colors), values, strict=True):
        axis.annotate(
            f"{value:.1f}",
            (value, bar.get_y() + bar.get_height() / 2),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axis.grid(visible=False, axis="y")
