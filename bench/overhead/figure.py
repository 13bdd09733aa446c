"""The figure of the overhead benchmark: the time of each entry as a multiple of bare futures, in a burst and in a steady load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.patches import Patch

from bench import plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.report import Run, Table

SHOWN = {"burst 32": "20,000 at once, batches of 32", "steady": "256 workers in a loop, batches of 32"}
OURS, WAITS, DOES_NOT, BARE = "microbatch", "peer that waits", "peer that does not", "floor"
COLORS = {OURS: plot.OURS, WAITS: plot.OTHERS[0], DOES_NOT: plot.OTHERS[1], BARE: plot.MUTED}


def draw(run: Run, tables: dict[str, Table]) -> Figure:
    figure, axes = plot.panels(len(SHOWN), width=6.4, height=6.0)
    for axis, (load, title) in zip(axes, SHOWN.items(), strict=True):
        _bars(axis, run, tables["asyncio"], f"{load}: x floor")
        axis.set(title=title, xlabel="wall time, times that of bare futures")
        axis.margins(x=0.08)
        legend = [Patch(color=color, label=kind) for kind, color in COLORS.items()]
        axis.legend(handles=[*legend, axis.axvline(1, color="black", linewidth=1, label="bare futures")], fontsize=7)
    figure.suptitle("The cost of submit, asyncio (same work: the peer composes the prompt and reads the reply too)")
    return figure


def _bars(axis: Axes, run: Run, table: Table, column: str) -> None:
    """Draw one bar for each row, the cheapest on top."""
    values = {name: row[column] for name, row in table.by("library").items()}
    names = sorted(values, key=values.__getitem__, reverse=True)
    bars = axis.barh(names, [values[name] for name in names], color=[COLORS[_kind(run, name)] for name in names])
    over_lines = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axis.bar_label(bars, [f"{values[name]:.1f}" for name in names], padding=3, fontsize=7, bbox=over_lines)
    axis.grid(visible=False, axis="y")


def _kind(run: Run, name: str) -> str:
    facts = run.samples["entries"][name]
    return {"ours": OURS, "floor": BARE}.get(facts["kind"], WAITS if facts["waits"] else DOES_NOT)
