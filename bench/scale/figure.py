"""The figures: time and memory by the number of items, who is served when, and the long run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench import plot
from bench.scale import at_once, endurance, items, service
from bench.timing import spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from bench.report import Report

COLORS = {items.MAP: plot.OURS, items.CHUNKS: plot.OTHERS[0], items.GATHER: plot.OTHERS[1]}
ROOM = 1.3
"""Times the greatest value that an axis reaches, so that a legend has its place above the lines."""


def draw(found: Report) -> Figure:
    layout = [["time", "memory", "served"], ["resident", "latency", "open"]]
    figure, axes = plot.mosaic(layout, width=14, height=7)
    _by_items(axes["time"], found.samples["items"], "cpu_us")
    axes["time"].set(title="CPU time of an item", ylabel="microseconds an item")
    axes["time"].set_ylim(0, ROOM * axes["time"].get_ylim()[1])
    _by_items(axes["memory"], found.samples["items"], "peak_mib")
    axes["memory"].set(title="Peak memory of the process", ylabel="MiB (log)", yscale="log")
    _numbers(axes["memory"].yaxis)
    axes["memory"].legend(loc="center right", fontsize=8)  # where no line is
    _served(axes["served"], found.samples["at_once"])
    seen = found.samples["endurance"]["seen"]
    _memory(axes["resident"], seen)
    _over_time(axes["latency"], seen, {"p50_ms": "p50", "p99_ms": "p99"})
    axes["latency"].set(title="Long run: time to the answer", ylabel="milliseconds")
    _over_time(axes["open"], seen, {name: endurance.LOOKED_AT[name] for name in ("tasks", "descriptors")})
    axes["open"].set(title="Long run: what is open", ylabel="count")
    figure.suptitle(
        "map, 1,000 lanes at once, and a long run at "
        f"{service.RATE} requests/s; SIMULATED endpoint (within the process above, over sockets below)"
    )
    return figure


def _by_items(axes: Axes, samples: dict[str, dict[str, list[dict[str, float]]]], name: str) -> None:
    """Draw the medians and, shaded, the least and the greatest."""
    counts: list[int] = []
    for way, by_count in samples.items():
        at = [int(count) for count in by_count]
        counts = max(counts, at, key=len)
        low, middle, high = zip(*(spread([each[name] for each in taken]) for taken in by_count.values()), strict=True)
        axes.plot(at, middle, marker="o", markersize=4, color=COLORS[way], label=items.SAID[way])
        axes.fill_between(at, low, high, color=COLORS[way], alpha=0.15)
    axes.set(xscale="log", xlabel="items (log)", xticks=counts)
    _numbers(axes.xaxis)
    axes.legend(loc="upper left", fontsize=8)


def _numbers(axis: Axis) -> None:
    """Write numbers, not powers of ten."""
    axis.set_major_formatter("{x:,.0f}")
    axis.set_minor_formatter("{x:,.0f}" if axis.axis_name == "y" else "")


def _served(axes: Axes, samples: dict[str, list[dict[str, list[float]]]]) -> None:
    percent = [share * 100 for share in at_once.QUANTILES]
    for way, color in ((at_once.OURS, plot.OURS), (at_once.COLLECTORS, plot.OTHERS[0])):
        for number, taken in enumerate(samples[way]):
            axes.plot(taken["lane_done_s"], percent, color=color, label="_" if number else way)
    axes.set(
        title="1,000 lanes at once: who has every answer",
        xlabel="seconds from the start",
        ylabel="lanes served whole, %",
    )
    axes.set_xlim(left=0)
    axes.legend(loc="upper left", fontsize=8)


def _memory(axes: Axes, seen: dict[str, list[float]]) -> None:
    _over_time(axes, seen, {"rss_mib": "resident MiB (left)"})
    axes.set(title="Long run: memory", ylabel="resident MiB")
    axes.legend(loc="upper left", fontsize=8)
    blocks = axes.twinx()
    blocks.grid(visible=False)
    _over_time(blocks, seen, {"blocks": "memory blocks (right)"}, plot.OTHERS[0])
    blocks.set_ylabel("memory blocks in use, thousands")
    blocks.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}")
    blocks.spines["right"].set_visible(True)
    blocks.legend(loc="upper right", fontsize=8)


def _over_time(axes: Axes, seen: dict[str, list[float]], labels: dict[str, str], *colors: str) -> None:
    minutes = [at / 60 for at in seen["at_s"]]
    for (name, label), color in zip(labels.items(), colors or (plot.OURS, plot.OTHERS[0]), strict=False):
        axes.plot(minutes, seen[name], color=color, label=label)
    axes.set_xlabel("minutes")
    axes.set_xlim(left=0)
    axes.set_ylim(0, ROOM * max(max(seen[name]) for name in labels))
    axes.legend(loc="upper left", fontsize=8)
