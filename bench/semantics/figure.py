"""The verdicts as a map of colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from bench import plot
from bench.semantics.verdict import MARKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bench.report import Report

COLOURS = {"right": "#86efac", "arguable": "#fde68a", "wrong": "#fca5a5", "hang": "#7f1d1d"}
MEANING = {
    "right": "right",
    "arguable": "arguable: nobody is harmed, but it could be better",
    "wrong": "wrong: somebody is harmed",
    "hang": "a caller hangs",
}
CELL = (0.98, 0.27)
"""Inches; a verdict's words in small print."""


def draw(found: Report) -> Figure:
    verdicts = found.samples["verdicts"]
    probes, names = list(verdicts), list(next(iter(verdicts.values())))
    order = list(MARKS)
    width, height = CELL
    figure, (axes,) = plot.panels(1, width=2.6 + width * len(names), height=1.5 + height * len(probes))
    grid = [[order.index(verdicts[probe][name]["mark"]) for name in names] for probe in probes]
    axes.imshow(
        grid, cmap=ListedColormap([COLOURS[mark] for mark in order]), vmin=0, vmax=len(order) - 1, aspect="auto"
    )
    for row, probe in enumerate(probes):
        for column, name in enumerate(names):
            verdict = verdicts[probe][name]
            ink = "white" if verdict["mark"] == "hang" else "black"
            axes.text(column, row, verdict["word"], ha="center", va="center", fontsize=6.5, color=ink)
    versions = {name: found.versions.get(found.samples["distributions"][name]) for name in names}
    axes.set_xticks(range(len(names)), [f"{name}\n{versions[name] or ''}".strip() for name in names], fontsize=7.5)
    axes.set_yticks(range(len(probes)), probes, fontsize=7.5)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xlabel("library")
    axes.set_ylabel("probe")
    axes.set_title("What happens to callers when something goes wrong")
    axes.grid(visible=False)
    axes.set_xticks([at - 0.5 for at in range(1, len(names))], minor=True)
    axes.set_yticks([at - 0.5 for at in range(1, len(probes))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    figure.legend(
        handles=[Patch(color=COLOURS[mark], label=MEANING[mark]) for mark in order],
        loc="outside lower center",
        ncols=4,
        fontsize=7.5,
    )
    return figure
