"""The figures: time and memory by the number of items, who is served when, and the long run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import plot
from bench.scale import at_once, endurance, items
from bench.timing import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.report import Report

COLORS = {items.MAP: plot.OURS, items.CHUNKS: plot.OTHERS[0], items.GATHER: plot.OTHERS[1]}


def draw(found: Report) -> Figure:
    layout = [["time", "memory", "served"], ["rss", "latency", "tasks"]]
    figure, axes = plot.mosaic(layout, width=14, height=7)
    _by_items(axes["time"], found.samples["items"], "us")
    axes["time"].set(title="Time of an item", ylabel="microseconds an item")
    axes["time"].set_ylim(bottom=0)
    _by_items(axes["memory"], found.samples["items"], "peak_mib")
    axes["memory"].set(title="Peak memory of the process", ylabel="MiB (log)", yscale="log")
    _served(axes["served"], found.samples["at_once"])
    _long_run(axes, found.samples["endurance"])
    return figure


def _by_items(axes: Axes, samples: dict[str, dict[str, list[dict[str, float]]]], name: str) -> None:
    for way, by_count in samples.items():
        counts = [int(count) for count in by_count]
        low, middle, high = zip(*(spread([each[name] for each in taken]) for taken in by_count.values()), strict=True)
        axes.plot(counts, middle, marker="o", markersize=4, color=COLORS[way], label=items.SAID[way])
        axes.fill_between(counts, low, high, color=COLORS[way], alpha=0.15)
    axes.set(xscale="log", xlabel="items (log)")
    axes.legend(fontsize=7)


def _served(axes: Axes, samples: dict[str, list[dict[str, list[float]]]]) -> None:
    for way, color in ((at_once.OURS, plot.OURS), (at_once.COLLECTORS, plot.OTHERS[0])):
        for number, taken in enumerate(samples[way]):
            percent = [share * 100 for share in at_once.QUANTILES]
            axes.plot(taken["lane_done_s"], percent, color=color, label="_" if number else way)
    axes.set(
        title="1,000 lanes at once: who has every answer",
        xlabel="seconds from the start",
        ylabel="lanes served whole, %",
    )
    axes.set_xlim(left=0)
    axes.legend(fontsize=7)


def _long_run(axes: dict[str, Axes], seen: dict[str, list[float]]) -> None:
    minutes = [at / 60 for at in seen["at_s"]]
    told = f"SIMULATED endpoint, {endurance.RATE} requests/s"
    axes["rss"].plot(minutes, seen["rss_mib"], color=plot.OURS, label="resident MiB (left)")
    axes["rss"].set(title=f"Long run: memory\n{told}", ylabel="MiB", ylim=(0, max(seen["rss_mib"]) * 1.3))
    objects = axes["rss"].twinx()
    objects.plot(minutes, seen["objects"], color=plot.OTHERS[0], label="objects (right)")
    objects.set(ylabel="objects of the collector", ylim=(0, max(seen["objects"]) * 1.3))
    axes["rss"].legend(loc="lower left", fontsize=7)
    objects.legend(loc="lower right", fontsize=7)
    for name, color in (("p50_ms", plot.OURS), ("p99_ms", plot.OTHERS[0])):
        axes["latency"].plot(minutes, seen[name], color=color, label=name.removesuffix("_ms"))
    axes["latency"].set(title=f"Long run: time to the answer\n{told}", ylabel="ms")
    for name, color in (("tasks", plot.OURS), ("descriptors", plot.OTHERS[0])):
        axes["tasks"].plot(minutes, seen[name], color=color, label=endurance.SHOWN[name])
    axes["tasks"].set(title=f"Long run: what is open\n{told}", ylabel="count")
    for name in ("latency", "tasks"):
        axes[name].set_ylim(bottom=0)
        axes[name].legend(fontsize=7)
    for name in ("rss", "latency", "tasks"):
        axes[name].set_xlabel("minutes")
