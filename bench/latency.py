"""The time to an answer: streamed against whole replies, by place in the batch, by load and by window.

All on virtual time against a SIMULATED endpoint within the process, so the figures are the same everywhere but for the random
letters of ids, which are a token more or less; processor time of the client is not in them (see `overhead` and `demux`).
"""

from __future__ import annotations

import asyncio
import random
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import microbatch as mb
from bench import plot
from bench.benchmark import Option
from bench.questions import Label, products
from bench.report import Table
from bench.timing import median, quantile
from microbatch.demo import instructions
from microbatch.testing import Latency, SimulatedModel, SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from bench.report import Run


QUESTION = "How much sooner is an answer there when a combined reply is streamed, and what does waiting for further requests cost?"
COMPARED = ["msgspec", "tiktoken"]
OPTIONS = {
    "batches": Option(int, 100, 6, "full batches by which places are compared"),
    "runs": Option(int, 5, 1, "runs of each load"),
    "arrivals": Option(int, 4_000, 400, "arrivals for each window"),
}

MODEL = "gpt-4.1-mini"
LATENCY = Latency(first_token=0.5, tokens_per_second=80.0)
NO_LIMIT = 10**6

STREAMED, WHOLE, ALONE = "streamed", "whole reply", "one call each"
MODES = (STREAMED, WHOLE, ALONE)
"""Callers are answered as their element closes, when the reply has ended, or each by a call of its own."""

SIZES = (8, 16, 50)
APART_S = 60.0
"""Seconds between full batches: far more than one takes."""

SIZE, SLOTS = 16, 4
"""The default batch, and few calls at once, so that a modest load saturates them."""

LOADS = {"idle": 0.01, "light": 0.25, "saturated": 0.95}
"""Arrivals as a share of the capacity of full batches. "light" is what one call each can just keep up with."""

COUNTS = {"idle": 400, "light": 1_200, "saturated": 3_000}
WARM_UP = 0.1
"""Share of the callers left out: they met an empty batcher."""

WINDOWS = (0.0, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
RATES = {"quiet": 1.0, "busy": 40.0}
"""Items per second. Quiet: a call has mostly ended when the next request comes, so that `idle` decides. Busy: calls are always under
way, so that the window decides."""

labels = cache(products)


class Served(NamedTuple):
    """Outcome of a run.

    Attributes:
        latencies: Seconds from submit to the answer, in order of arrival.
        waits: Seconds from submit until the call left.
        calls: Upstream calls.
        tokens: Prompt and reply tokens of all calls.
    """

    latencies: list[float]
    waits: list[float]
    calls: int
    tokens: int


def play(arrivals: Sequence[float], seed: int, mode: str, *, max_batch_size: int, **policy) -> Served:
    """Start a caller at each instant of *arrivals* (seconds, ascending) that asks about a random product.

    Raises:
        AssertionError: An answer was wrong, or took a second call.
    """
    settings = mb.FlushPolicy(
        max_batch_size=1 if mode == ALONE else max_batch_size,
        max_batch_tokens=NO_LIMIT,
        max_output_tokens=NO_LIMIT,
        max_queued=NO_LIMIT,
        **policy,
    )
    asked = random.Random(seed).choices(list(labels()), k=len(arrivals))
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(_play(arrivals, asked, settings, "verified" if mode == WHOLE else "stream"))


async def _play(arrivals: Sequence[float], asked: list[str], policy: mb.FlushPolicy, resolve: str) -> Served:
    loop = asyncio.get_running_loop()
    model = SimulatedModel(answer=lambda text, _: labels()[text], latency=LATENCY)
    fallback = mb.FallbackPolicy(resolve=resolve)
    batcher = mb.Microbatcher(SimulatedTransport(model), policy=policy, fallback=fallback, tokens="bytes")
    system = {"role": "system", "content": instructions()}

    async def ask(question: str) -> mb.Reply[Label]:
        messages = [system, {"role": "user", "content": question}]
        reply = await batcher.submit(messages, output_type=Label, model=MODEL)
        assert reply.output == labels()[question], "a wrong answer"
        return reply

    async with batcher:
        tasks = []
        for at, question in zip(arrivals, asked, strict=True):
            if at > loop.time():
                await asyncio.sleep(at - loop.time())
            tasks.append(loop.create_task(ask(question)))
        replies = [await task for task in tasks]
    assert model.items == len(arrivals), "an item was asked about twice"
    tokens = model.prompt_tokens + model.completion_tokens
    return Served([reply.latency for reply in replies], [reply.waited for reply in replies], model.calls, tokens)


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Return the instants of *count* independent arrivals, *rate* per second."""
    draw = random.Random(seed)
    now = 0.0
    return [now := now + draw.expovariate(rate) for _ in range(count)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    places = positions(options.batches, options.seed)
    batch_s, alone_s = max(places[str(SIZE)][WHOLE]["places"]), places[str(SIZE)][ALONE]["mean"]
    capacity, alone_capacity = SLOTS * SIZE / batch_s, SLOTS / alone_s
    return {
        "positions": places,
        "capacity": capacity,
        "alone_capacity": alone_capacity,
        "loads": loads(capacity, options.runs, options.seed),
        "windows": windows(options.arrivals, options.seed),
    }


def positions(batches: int, seed: int) -> dict[str, Any]:
    """Measure full batches on an idle batcher, all requests at the same instant."""
    found: dict[str, Any] = {}
    for size in SIZES:
        arrivals = [number * APART_S for number in range(batches) for _ in range(size)]
        for mode in MODES:
            served = play(arrivals, seed, mode, max_batch_size=size)
            assert served.calls == (len(arrivals) if mode == ALONE else batches), "batches were not full"
            taken = served.latencies
            mean_at = [sum(taken[place::size]) / batches for place in range(size)]
            found.setdefault(str(size), {})[mode] = summary(taken) | {"places": mean_at}
    return found


def loads(capacity: float, runs: int, seed: int) -> dict[str, Any]:
    """Measure random arrivals while few calls may be under way; medians over the runs."""
    found: dict[str, Any] = {}
    for name, share in LOADS.items():
        found[name] = {"rate": share * capacity}
        for mode in MODES:
            several = []
            for at in range(seed, seed + runs):
                arrivals = poisson(share * capacity, COUNTS[name], at)
                served = play(arrivals, at, mode, max_batch_size=SIZE, max_concurrent_batches=SLOTS)
                steady = served.latencies[round(WARM_UP * len(arrivals)) :]
                several.append(summary(steady) | {"batch": len(arrivals) / served.calls})
            found[name][mode] = {key: median(one[key] for one in several) for key in several[0]}
    return found


def windows(count: int, seed: int) -> dict[str, Any]:
    """Measure each window at a low and at a high rate of arrivals."""
    found: dict[str, Any] = {}
    for name, rate in RATES.items():
        arrivals = poisson(rate, count, seed)

        def point(mode: str, idle: str, max_wait: float, arrivals=arrivals) -> dict[str, float]:
            served = play(arrivals, seed, mode, max_batch_size=SIZE, idle=idle, max_wait=max_wait)
            return summary(served.latencies) | {
                "max_wait": max_wait,
                "batch": count / served.calls,
                "added_ms": sum(served.waits) / count * 1e3,
                "tokens": served.tokens / count,
            }

        found[name] = {ALONE: [point(ALONE, "flush", 0.0)]}
        found[name] |= {idle: [point(STREAMED, idle, wait) for wait in WINDOWS] for idle in ("flush", "wait")}
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"mean": sum(values) / len(values), "p50": quantile(values, 0.5), "p99": quantile(values, 0.99)}


SCENE = (
    f"SIMULATED endpoint on virtual time: {LATENCY.first_token} s to the first token, then {LATENCY.tokens_per_second:g} tokens/s in "
    "each call, however many there are; no network and no processor time. Answers are labels, so most of an element is its id."
)
SECONDS = "mean {:.3f} | p50 {:.3f} | p99 {:.3f}"
SHARES = ("mean", "p50", "p99")
DEFAULT_WAIT, LONGEST_WAIT = 0.1, 0.5


def tables(run: Run) -> dict[str, Table]:
    return {"positions": positions_table(run), "loads": loads_table(run), "windows": windows_table(run)}


def positions_table(run: Run) -> Table:
    table = Table(
        f"Seconds to the answer in a full batch, SIMULATED endpoint, {run.options['batches']} batches each, all requests at once, no limit "
        "on calls",
        f"batch | mode | {SECONDS} | first {{:.3f}} | last {{:.3f}}",
        "First and last: by place in the batch, on average.",
    )
    for size, modes in run.samples["positions"].items():
        for mode, one in modes.items():
            table.add(size, mode, *(one[name] for name in SHARES), one["places"][0], one["places"][-1])
    return table


def loads_table(run: Run) -> Table:
    table = Table(
        f"Seconds to the answer by load, SIMULATED endpoint, Poisson arrivals, 4 calls at once, batches of at most 16, median of "
        f"{run.options['runs']} runs",
        f"load | items/s {{:.2f}} | mode | {SECONDS} | mean batch {{:.2f}} | calls an item {{:.3f}}",
        f"Capacity: {run.samples['capacity']:.1f} items/s in full batches, {run.samples['alone_capacity']:.1f} items/s one call each; "
        "beyond it, the queue and the times grow for as long as callers come. The first tenth of the callers is left out.",
    )
    for load, modes in run.samples["loads"].items():
        for mode in MODES:
            one = modes[mode]
            table.add(load, modes["rate"], mode, *(one[name] for name in SHARES), one["batch"], 1 / one["batch"])
    return table


def windows_table(run: Run) -> Table:
    table = Table(
        f"The window: wait against batch size, SIMULATED endpoint, streamed, batches of at most 16, {run.options['arrivals']:,} Poisson "
        "arrivals each",
        "arrivals | idle | max_wait, ms {:.0f} | mean batch {:.2f} | added wait, mean ms {:.1f} | p50 s {:.3f}"
        " | p99 s {:.3f} | tokens an item {:.0f}",
        "Added wait: from submit until the call leaves. Arrivals: quiet 1 a second, busy 40 a second.",
    )
    for name, by_idle in run.samples["windows"].items():
        for idle, points in by_idle.items():
            for one in points:
                max_wait = None if idle == ALONE else one["max_wait"] * 1e3
                table.add(name, idle, max_wait, *(one[key] for key in ("batch", "added_ms", "p50", "p99", "tokens")))
    return table


def findings(run: Run, tables: dict[str, Table]) -> list[str]:
    found = [SCENE]
    for (size, mode), row in tables["positions"].by("batch", "mode").items():
        if mode == STREAMED:
            whole, alone = (run.samples["positions"][size][other] for other in (WHOLE, ALONE))
            found.append(
                f"Batches of {size}: streaming answers after {row['mean']:.2f} s on average against {whole['mean']:.2f} s for the whole "
                f"reply ({1 - row['mean'] / whole['mean']:.0%} sooner), the first after {row['first']:.2f} s; p99 is {row['p99']:.2f} s "
                f"against {whole['p99']:.2f} s. One call each takes {alone['mean']:.2f} s where nothing limits calls: even streamed, a "
                f"batch takes {row['mean'] / alone['mean']:.1f} times that on average."
            )
    for load, modes in run.samples["loads"].items():
        p50, p99 = ([modes[mode][name] for mode in MODES] for name in ("p50", "p99"))
        beyond = modes["rate"] > run.samples["alone_capacity"]
        found.append(
            f"{load.capitalize()} load ({modes['rate']:.2f} items/s, mean batch {modes[STREAMED]['batch']:.1f}): p50 {p50[0]:.2f} s "
            f"streamed, {p50[1]:.2f} s whole, {p50[2]:.2f} s one call each; p99 {p99[0]:.2f}, {p99[1]:.2f} and {p99[2]:.2f} s."
            + (" One call each cannot keep up: its times grow for as long as callers come." if beyond else "")
        )
    for name, by_idle in run.samples["windows"].items():
        alone = by_idle[ALONE][0]["tokens"]
        for idle in ("flush", "wait"):
            at = {one["max_wait"]: one for one in by_idle[idle]}
            words = [
                f"max_wait {wait * 1e3:.0f} ms makes batches of {at[wait]['batch']:.2f} and saves {1 - at[wait]['tokens'] / alone:.0%} of the "
                f"tokens for {at[wait]['added_ms']:.0f} ms of added wait"
                for wait in (DEFAULT_WAIT, LONGEST_WAIT)
            ]
            found.append(f'{name.capitalize()} arrivals, idle="{idle}": {"; ".join(words)}.')
    return found


def draw(run: Run, tables: dict[str, Table]) -> Figure:
    """Draw the time to the answer by place in the batch, which the tables only sum up."""
    del tables
    colors = {STREAMED: plot.OURS, WHOLE: plot.OTHERS[0]}
    figure, (axes,) = plot.panels(width=7.0)
    samples = run.samples["positions"]
    for size, style in (("16", "-"), ("50", "--")):
        for mode, color in colors.items():
            seconds = samples[size][mode]["places"]
            axes.plot(range(1, len(seconds) + 1), seconds, style, color=color, label=f"{mode}, batch of {size}")
    axes.axhline(samples["16"][ALONE]["mean"], color=plot.MUTED, label=ALONE)
    axes.set(xlabel="place in the batch", ylabel="seconds to the answer")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    pace = f"{LATENCY.first_token} s to the first token, {LATENCY.tokens_per_second:g} tokens/s"
    figure.suptitle(f"SIMULATED endpoint: {pace}; virtual time")
    return figure
