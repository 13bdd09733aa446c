"""The figure of the latency benchmark: time by place, the trade between wait and batch size, and quantiles by load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench import plot
from bench.latency.world import ALONE, LATENCY, MODES, STREAMED, WHOLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.report import Run, Table

COLORS = {STREAMED: plot.OURS, WHOLE: plot.OTHERS[0], ALONE: plot.MUTED}
LABELLED_FROM = {"quiet": 5, "busy": 3}
"""The first window whose point is labelled: those before lie too close to each other."""


def draw(run: Run, tables: dict[str, Table]) -> Figure:
    del tables
    figure, (places, trade, loads) = plot.panels(3)
    _places(places, run.samples["positions"])
    _trade(trade, run.samples["windows"])
    _loads(loads, run.samples["loads"])
    pace = f"{LATENCY.first_token} s to the first token, {LATENCY.tokens_per_second:g} tokens/s"
    figure.suptitle(f"SIMULATED endpoint: {pace}; virtual time")
    return figure


def _places(axes: Axes, samples: dict[str, Any]) -> None:
    for size, style in (("16", "-"), ("50", "--")):
        for mode in (STREAMED, WHOLE):
            seconds = samples[size][mode]["places"]
            axes.plot(range(1, len(seconds) + 1), seconds, style, color=COLORS[mode], label=f"{mode}, batch of {size}")
    axes.axhline(samples["16"][ALONE]["mean"], color=COLORS[ALONE], label=ALONE)
    axes.set(title="Time to answer by place in the batch", xlabel="place in the batch", ylabel="seconds to the answer")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def _trade(axes: Axes, samples: dict[str, Any]) -> None:
    colors = iter((plot.OTHERS[1], plot.OTHERS[2], plot.OURS, plot.OTHERS[0]))
    for name, by_idle in samples.items():
        for idle, style in (("flush", {"linewidth": 3.5}), ("wait", {"linestyle": "--", "markersize": 4})):
            points = by_idle[idle]
            waits, sizes = ([one[key] for one in points] for key in ("added_ms", "batch"))
            axes.plot(waits, sizes, marker="o", color=next(colors), label=f'{name}, idle="{idle}"', **style)
            if idle == "wait":
                for one in points[LABELLED_FROM[name] :]:
                    at = (one["added_ms"], one["batch"])
                    words = f"{one['max_wait'] * 1e3:.0f}"
                    axes.annotate(words, at, xytext=(4, -9), textcoords="offset points", fontsize=7)
    axes.set(
        title="Wait and batch size (points: max_wait, ms)", xlabel="added wait, mean ms", ylabel="mean items a call"
    )
    axes.legend(fontsize=7)


def _loads(axes: Axes, samples: dict[str, Any]) -> None:
    width = 0.8 / len(MODES)
    for number, mode in enumerate(MODES):
        at = [place + (number - 1) * width for place in range(len(samples))]
        for share, alpha in (("p99", 0.35), ("p50", 1.0)):
            heights = [modes[mode][share] for modes in samples.values()]
            axes.bar(at, heights, width * 0.9, color=COLORS[mode], alpha=alpha, label=f"{mode}, {share}")
    axes.set(
        title="Time to answer by load, 4 calls at once", xlabel="offered load", ylabel="seconds to the answer (log)"
    )
    axes.set(yscale="log", xticks=range(len(samples)), xticklabels=list(samples))
    axes.legend(fontsize=7)
