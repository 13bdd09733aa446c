"""The figures: items a minute by batch size, the client's processor time, and dollars saved by length of the instructions."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench import plot
from bench.throughput import formula, quotas, sockets
from bench.throughput.framing import Framing, foretell
from bench.throughput.scene import RATIO, SIZE, SIZES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.report import Report

COLOURS = dict(zip(quotas.REGIMES, (plot.OURS, plot.OTHERS[0], plot.MUTED), strict=True))
KINDS = {sockets.WHOLE: plot.OURS, sockets.STREAMED: plot.OTHERS[0]}
DRAWN_SIZES = (SIZES[0], SIZE, SIZES[-1])
DRAWN_LENGTHS = range(0, 1_051, 10)


def draw(found: Report) -> Figure:
    figure, (rate, processor, saved) = plot.panels(3, width=5.6, height=4.2)
    _rate(rate, found)
    _processor(processor, found)
    _saved(saved, found)
    figure.suptitle("Products under six labels, SIMULATED endpoint")
    return figure


def _rate(axes: Axes, found: Report) -> None:
    sizes = {quotas.ALONE.name: 1} | {way.name: way.size for way in quotas.WAYS if way.size > 1 and not way.cached}
    for regime, colour in COLOURS.items():
        points = [
            (sizes[row[1]], row[2]) for row in found.tables["jobs"].rows if row[0] == regime.name and row[1] in sizes
        ]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=regime.name)
    axes.set(title="Throughput by batch size (virtual time)", xlabel="items a call (log)", ylabel="items/min (log)")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks([1, *SIZES], [str(size) for size in (1, *SIZES)])
    axes.minorticks_off()
    axes.legend(fontsize=8, title="limited to", loc="upper left")
    axes.set_ylim(top=10 * axes.get_ylim()[1])  # room for the legend


def _processor(axes: Axes, found: Report) -> None:
    by_kind = found.samples["client"]
    names = list(by_kind[sockets.WHOLE])
    for place, (kind, colour) in enumerate(KINDS.items()):
        several = {name: statistics.median(map(sockets.cpu_ms, taken)) for name, taken in by_kind[kind].items()}
        at = [names.index(name) + (place - 0.5) * 0.38 for name in several]
        bars = axes.barh(at, list(several.values()), 0.36, color=colour, label=f"{kind} replies")
        axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(title="Client CPU (real sockets)", xlabel="processor ms an item (log)", xscale="log")
    axes.margins(x=0.12)  # room for the numbers
    axes.legend(fontsize=8)


def _saved(axes: Axes, found: Report) -> None:
    framing = Framing(**found.samples["framing"])
    text = found.samples["text_tokens"]
    for size, colour in zip(DRAWN_SIZES, (plot.OTHERS[0], plot.OURS, plot.OTHERS[1]), strict=True):
        told = [foretell(framing, length, size, text, RATIO).dollars_saved * 100 for length in DRAWN_LENGTHS]
        axes.plot(DRAWN_LENGTHS, told, color=colour, label=f"{size} items a call")
        points = [one for one in found.samples["savings"] if one["size"] == size]
        lengths, measured = ([one[name] for one in points] for name in ("instructions", "dollars_saved"))
        axes.plot(lengths, [share * 100 for share in measured], "o", markersize=5, color=colour)
    axes.axhline(0, color=plot.MUTED, linewidth=1)
    axes.set(
        title="Dollars saved (line: foretold, point: measured)", xlabel="shared instructions, tokens", ylabel="saved, %"
    )
    axes.set_xticks(formula.LENGTHS, [f"{length:,}" for length in formula.LENGTHS])
    axes.legend(fontsize=8, loc="lower right")
