"""The figures: time by place, the trade between wait and batch size, and the quantiles by load."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from bench import plot
from bench.latency import windows
from bench.latency.world import ALONE, LATENCY, MODES, STREAMED, WHOLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.report import Report

SHOWN_SIZES = ("16", "50")
LABELLED = {"quiet": 5, "busy": 3}
"""The first window whose point is labelled: those before lie too close to each other."""

COLORS = {STREAMED: plot.OURS, WHOLE: plot.OTHERS[0], ALONE: plot.MUTED}


def draw(found: Report) -> Figure:
    figure, (places, trade, loads) = plot.panels(3)
    _places(places, found.samples["positions"])
    _trade(trade, found.samples["windows"])
    _loads(loads, found.samples["loads"])
    figure.suptitle(
        f"SIMULATED endpoint: {LATENCY.first_token} s to the first token, {LATENCY.tokens_per_second:g} tokens/s; virtual time"
    )
    return figure


def _places(axes: Axes, samples: dict[str, dict[str, list[float]]]) -> None:
    for size, style in zip(SHOWN_SIZES, ("-", "--"), strict=True):
        for mode in (STREAMED, WHOLE):
            seconds = samples[size][mode]
            axes.plot(range(1, len(seconds) + 1), seconds, style, color=COLORS[mode], label=f"{mode}, batch of {size}")
    axes.axhline(statistics.mean(samples[SHOWN_SIZES[0]][ALONE]), color=COLORS[ALONE], label=ALONE)
    axes.set(title="Time to answer by place in the batch", xlabel="place in the batch", ylabel="seconds to the answer")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def _trade(axes: Axes, samples: dict[str, dict[str, list[list[float]]]]) -> None:
    styles = {
        ("busy", "flush"): plot.OURS,
        ("busy", "wait"): plot.OTHERS[0],
        ("quiet", "flush"): plot.OTHERS[1],
        ("quiet", "wait"): plot.OTHERS[2],
    }
    for name, by_idle in samples.items():
        for idle, points in by_idle.items():
            waits, sizes = [point[2] for point in points], [point[1] for point in points]
            label = f'{name} ({windows.RATES[name]:g}/s), idle="{idle}"'
            # Where calls are always under way both ways to idle are the same: one line shows beside the other.
            style = {"linestyle": "--", "markersize": 4} if idle == "wait" else {"linewidth": 3.5, "markersize": 7}
            axes.plot(waits, sizes, marker="o", color=styles[name, idle], label=label, **style)
            if idle == "wait":
                for point in points[LABELLED[name] :]:
                    axes.annotate(
                        f"{point[0]:.0f}", (point[2], point[1]), xytext=(4, -9), textcoords="offset points", fontsize=7
                    )
    axes.set(
        title="What waiting brings (points: max_wait, ms)", xlabel="added wait, mean ms", ylabel="mean items a call"
    )
    axes.legend(fontsize=7)


def _loads(axes: Axes, samples: dict[str, dict[str, dict[str, list[float]]]]) -> None:
    width = 0.8 / len(MODES)
    for at, mode in enumerate(MODES):
        xs = [place + (at - 1) * width for place in range(len(samples))]
        p50, p99 = ([statistics.median(by_mode[mode][name]) for by_mode in samples.values()] for name in ("p50", "p99"))
        axes.bar(xs, p99, width * 0.9, color=COLORS[mode], alpha=0.35, label=f"{mode}, p99")
        axes.bar(xs, p50, width * 0.9, color=COLORS[mode], label=f"{mode}, p50")
    axes.set(
        title="Time to answer by load, 4 calls at once", xlabel="offered load", ylabel="seconds to the answer (log)"
    )
    axes.set(yscale="log", xticks=range(len(samples)), xticklabels=list(samples))
    axes.legend(fontsize=7)
