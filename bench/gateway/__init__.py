"""What the gateway costs: the same client asks the simulated endpoint directly, through a pass-through of ours on aiohttp that only
relays bytes, and through `microbatch serve`, each a process of its own on 127.0.0.1.

Load: workers in a closed loop, each question another, one system prompt. Low load: one request after the other, and what each way
adds to the direct one. The ways take turns, and the tables show medians over the rounds. The endpoint is SIMULATED.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
from typing import TYPE_CHECKING

from bench import plot
from bench.gateway.load import Kind, Loaded, closed_loop, one_by_one
from bench.gateway.ways import DIRECT, GATEWAY, PASS_THROUGH, running
from bench.report import Column, Report, Table
from bench.timing import quantile, ratios

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure

    from bench.gateway.ways import Way

QUESTION = "What does the gateway add to a request, beside asking directly and through a proxy that only relays?"
COMPARED = ["aiohttp"]

WORKERS = 64
REQUESTS, REQUESTS_QUICK = 2_000, 300
LOW, LOW_QUICK = 300, 80
ROUNDS, ROUNDS_QUICK = 5, 2
REPLIES = {"whole": Kind(False, 12), "streamed": Kind(True, 12), "streamed, long": Kind(True, 140)}
"""Answers of some 6 tokens, a little more than a label, and of some 80, a short paragraph."""
QUANTILES = (0.5, 0.99)
COLOURS = {DIRECT: plot.MUTED, PASS_THROUGH: plot.OTHERS[0], GATEWAY: plot.OURS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--requests", type=int, help=f"of a round under load (default {REQUESTS}; {REQUESTS_QUICK} if quick)"
    )
    parser.add_argument("--low", type=int, help=f"one by one, of a round (default {LOW}; {LOW_QUICK} if quick)")
    parser.add_argument(
        "--workers", type=int, default=WORKERS, help="requests at a time under load (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, help=f"alternating rounds (default {ROUNDS}; {ROUNDS_QUICK} if quick)")
    parser.add_argument(
        "--latency", type=float, default=0.0, help="seconds to the endpoint's first token (default %(default)s)"
    )


def run(options: argparse.Namespace, found: Report) -> None:
    requests = options.requests or (REQUESTS_QUICK if options.quick else REQUESTS)
    low = options.low or (LOW_QUICK if options.quick else LOW)
    rounds = options.rounds or (ROUNDS_QUICK if options.quick else ROUNDS)
    workers, latency = options.workers or WORKERS, options.latency or 0.0
    scene = f"SIMULATED endpoint, {latency:g} s to answer; medians of {rounds} rounds"
    found.tables["load"] = Table(
        f"{workers} requests at a time, {requests:,} a round; {scene}",
        [
            Column("reply"),
            Column("way"),
            Column("requests/s", ",.0f"),
            Column("of direct", ".0%"),
            Column("requests a call", ".1f"),
            Column("CPU ms/request in the middle", ".2f"),
            Column("CPU ms/request at the endpoint", ".2f"),
        ],
    )
    found.tables["latency"] = Table(
        f"One request at a time, {low:,} a round; {scene}",
        [
            Column("reply"),
            Column("way"),
            Column("p50 ms", ".2f"),
            Column("p99 ms", ".2f"),
            Column("adds to direct, p50 ms", "+.2f"),
            Column("adds to direct, p99 ms", "+.2f"),
            Column("adds to pass-through, p50 ms", "+.2f"),
            Column("adds to pass-through, p99 ms", "+.2f"),
        ],
    )
    asyncio.run(measure(found, requests, low, workers, rounds, latency))
    found.findings += judged(found)


async def measure(found: Report, requests: int, low: int, workers: int, rounds: int, latency: float) -> None:
    async with running(latency) as there:
        for reply, kind in REPLIES.items():
            loaded: dict[str, list[Loaded]] = {way.name: [] for way in there}
            for number in range(-1, rounds):  # the first round warms up
                for way in there:
                    gc.collect()
                    sample = await closed_loop(way, requests, workers, kind)
                    if number >= 0:
                        loaded[way.name].append(sample)
            found.samples[f"load, {reply}"] = {
                name: [one._asdict() for one in several] for name, several in loaded.items()
            }
            tell_load(found.tables["load"], reply, loaded)
            latencies = await low_load(there, low, rounds, kind)
            found.samples[f"latency ms, {reply}"] = latencies
            tell_latency(found.tables["latency"], reply, latencies)


async def low_load(there: list[Way], low: int, rounds: int, kind: Kind) -> dict[str, list[tuple[float, ...]]]:
    """Return the quantiles of each way's milliseconds, of every round."""
    latencies: dict[str, list[tuple[float, ...]]] = {way.name: [] for way in there}
    for _ in range(rounds):
        gc.collect()
        for name, taken in (await one_by_one(there, low, kind)).items():
            latencies[name].append(tuple(quantile(taken, share) for share in QUANTILES))
    return latencies


def tell_load(table: Table, reply: str, loaded: dict[str, list[Loaded]]) -> None:
    base = [one.rate for one in loaded[DIRECT]]
    for name, several in loaded.items():
        rate, middle, endpoint, per_call = (statistics.median(column) for column in zip(*several, strict=True))
        share = statistics.median(ratios([one.rate for one in several], base))
        table.add(reply, name, rate, share, per_call, None if name == DIRECT else middle, endpoint)


def tell_latency(table: Table, reply: str, latencies: dict[str, list[tuple[float, ...]]]) -> None:
    for name, rounds in latencies.items():
        own = [statistics.median(column) for column in zip(*rounds, strict=True)]
        over_direct = [None, None] if name == DIRECT else added(rounds, latencies[DIRECT])
        over_relay = added(rounds, latencies[PASS_THROUGH]) if name == GATEWAY else [None, None]
        table.add(reply, name, *own, *over_direct, *over_relay)


def added(rounds: list[tuple[float, ...]], base: list[tuple[float, ...]]) -> list[float]:
    """Return the medians of what each quantile is above the *base* of its own round."""
    columns = zip(zip(*rounds, strict=True), zip(*base, strict=True), strict=True)
    return [statistics.median(mine - theirs for mine, theirs in zip(*column, strict=True)) for column in columns]


def judged(found: Report) -> list[str]:
    findings = []
    for reply in REPLIES:
        load, latency = (
            {row[1]: row[2:] for row in found.tables[name].rows if row[0] == reply} for name in ("load", "latency")
        )
        gateway, relay = load[GATEWAY], load[PASS_THROUGH]
        adds, relay_adds = latency[GATEWAY][2:4], latency[PASS_THROUGH][2:4]
        alone = f"the gateway adds {adds[0]:.2f} ms at p50 and {adds[1]:.2f} ms at p99"
        findings.append(
            f"Replies {reply}: one at a time, {alone}, the pass-through {relay_adds[0]:.2f} and {relay_adds[1]:.2f}; under load it "
            f"bears {gateway[0] / relay[0]:.0%} of the pass-through's requests/s for {gateway[3] / relay[3]:.1f} times its processor "
            f"time, with {gateway[2]:.1f} requests a call."
        )
    cores = f"Client, endpoint and what is between them share {found.machine.cores} cores, so requests/s are of them all together"
    return [*findings, f"{cores}; loopback has no network in it, and a p99 of a few hundred requests is rough."]


def draw(found: Report) -> Figure:
    figure, panels = plot.panels(3, width=4.2)
    ylabels = {"requests/s": "requests/s", "CPU ms/request in the middle": "CPU ms/request", "p50 ms": "ms at p50"}
    titles = ("Throughput under load", "Processor time in the middle", "One request at a time")
    for axes, title, (name, ylabel) in zip(panels, titles, ylabels.items(), strict=True):
        table = found.tables["latency" if name == "p50 ms" else "load"]
        at = [column.name for column in table.columns].index(name)
        replies = list(dict.fromkeys(row[0] for row in table.rows))
        for place, (way, colour) in enumerate(COLOURS.items()):
            heights = [row[at] or 0.0 for row in table.rows if row[1] == way]
            axes.bar(
                [where + (place - 1) * 0.27 for where in range(len(replies))], heights, 0.25, color=colour, label=way
            )
        axes.set_xticks(range(len(replies)), replies)
        axes.set(title=title, ylabel=ylabel)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS))
    figure.suptitle("The gateway on loopback, SIMULATED endpoint")
    return figure
