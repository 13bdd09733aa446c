"""The figures: time by method and chunk, and a map of what is recovered."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench import plot
from bench.demux import readers
from bench.demux.replies import ITEMS, KINDS
from bench.demux.speed import ITEMS as MANY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.report import Report

_WRONG = "#fecaca"


def draw(found: Report) -> Figure:
    kinds = [kind.name for kind in KINDS]
    figure, axes = plot.mosaic([kinds, ["recovery"] * len(kinds)], width=14, height=11)
    for name in kinds:
        _speed(axes[name], name, found.samples["speed"][name])
    axes[kinds[0]].set_ylabel(f"processor microseconds an item, {MANY} items (log)")
    axes[kinds[0]].legend(fontsize=7)
    _recovery(axes["recovery"], found.samples["recovery"])
    return figure


def _speed(axes: Axes, kind: str, by_piece: dict[str, dict[str, list[float] | None]]) -> None:
    pieces = list(by_piece)
    others = iter(plot.OTHERS)
    for name in readers.BY_NAME:
        color = plot.OURS if name == readers.OURS else next(others)
        points = [(at, times[name]) for at, times in enumerate(by_piece.values()) if times[name] is not None]
        if points:
            at, values = zip(*points, strict=True)
            style = {"linewidth": 2.5, "zorder": 3} if name == readers.OURS else {"linewidth": 1.2}
            axes.plot(at, [statistics.median(each) for each in values], marker="o", color=color, label=name, **style)
    axes.set(title=f"Taking apart a reply: {kind}" + (" characters" if "text" in kind else "s"))
    axes.set(yscale="log", xlabel="characters in a chunk", xticks=range(len(pieces)), xticklabels=pieces)


def _recovery(axes: Axes, samples: dict[str, dict[str, tuple[int, int, int]]]) -> None:
    damages = list(samples)
    methods = list(samples[damages[0]])
    right = [[samples[what][name][0] for what in damages] for name in methods]
    axes.imshow(
        right, cmap="Greens", vmin=0, vmax=ITEMS * 1.6, aspect="auto"
    )  # above the most, so that words stay legible
    for row, name in enumerate(methods):
        for column, what in enumerate(damages):
            good, wrong, _ = samples[what][name]
            box = {"boxstyle": "round,pad=0.2", "facecolor": _WRONG, "edgecolor": "none"} if wrong else None
            words = f"{good}, {wrong} wrong" if wrong else f"{good}"
            axes.text(column, row, words, ha="center", va="center", fontsize=7, bbox=box)
    axes.grid(visible=False)
    axes.set_xticks(range(len(damages)), damages, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(methods)), methods)
    axes.set(
        title=f"Right answers recovered of {ITEMS} (and wrong ones handed out, in red)",
        xlabel="what is wrong with the reply",
    )
