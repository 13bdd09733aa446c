"""What waiting for company costs and brings: the window swept, and a lone request."""

from __future__ import annotations

import asyncio
import statistics
from typing import TYPE_CHECKING

from bench import timing
from bench.latency.world import ALONE, MODEL, STREAMED, messages, model, play, poisson
from bench.questions import Label, products
from bench.report import Column, Table
from microbatch.protocols import ChatCall
from microbatch.schema.answer_type import answer_type
from microbatch.testing import SimulatedTransport, VirtualClockLoop

if TYPE_CHECKING:
    from bench.report import Report

SIZE = 16
WINDOWS = (0.0, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5)
RATES = {"quiet": 1.0, "busy": 40.0}
"""Items a second. Quiet: a call has mostly ended when the next request comes, so that `idle` decides. Busy: calls are always under
way, so that the window decides, and the longest brings more than a batch holds."""

DEFAULT_WAIT = 0.1


def sweep(found: Report, count: int) -> None:
    """Fill in the table of windows."""
    table = Table(
        f"The window: wait against batch size, SIMULATED endpoint, streamed, batches of at most {SIZE}, {count:,} Poisson arrivals each",
        [
            Column("arrivals"),
            Column("idle"),
            Column("max_wait, ms", ".0f"),
            Column("mean batch", ".2f"),
            Column("added wait, mean ms", ".1f"),
            *(Column(f"time to answer, {name} s", ".3f") for name in ("p50", "p99")),
            Column("calls an item", ".3f"),
            Column("tokens an item", ".0f"),
        ],
        notes=[
            "Added wait: from submit until the call leaves. Arrivals: "
            + ", ".join(f"{name} {rate:g} a second" for name, rate in RATES.items())
            + "."
        ],
    )
    samples = found.samples["windows"] = {}
    for name, rate in RATES.items():
        arrivals = poisson(rate, count, found.seed)

        def told(idle: str, max_wait: float | None, mode: str, name=name, arrivals=arrivals):
            policy = {"idle": "flush", "max_wait": 0.0} if max_wait is None else {"idle": idle, "max_wait": max_wait}
            served = play(arrivals, found.seed, mode, max_batch_size=SIZE, **policy)
            times = served.latencies
            row = [
                served.batch_size,
                statistics.mean(served.waits) * 1e3,
                *(timing.quantile(times, share) for share in (0.5, 0.99)),
                served.calls / len(times),
                served.tokens / len(times),
            ]
            table.add(name, idle, None if max_wait is None else max_wait * 1e3, *row)
            return row

        told(ALONE, None, ALONE)
        samples[name] = {
            idle: [[max_wait * 1e3, *told(idle, max_wait, STREAMED)] for max_wait in WINDOWS]
            for idle in ("flush", "wait")
        }
    found.tables["windows"] = table


def lone(found: Report) -> None:
    """Fill in the table of single requests."""
    question = next(iter(dict(products())))
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        direct = runner.run(_direct(question))
    table = Table(
        f"One request, SIMULATED endpoint, max_wait {DEFAULT_WAIT * 1e3:.0f} ms",
        [Column("how"), Column("time to answer, s", ".4f"), Column("added, ms", ".1f")],
    )
    table.add("straight to the transport", direct, 0.0)
    second_after = 0.01
    cases = {
        'on an idle batcher, idle="flush"': ([0.0], "flush"),
        'on an idle batcher, idle="wait"': ([0.0], "wait"),
        f'{second_after * 1e3:.0f} ms after another one, idle="flush"': ([0.0, second_after], "flush"),
    }
    for how, (arrivals, idle) in cases.items():
        # One question only, as it was asked directly: the length of answers is no part of this.
        served = play(
            arrivals, found.seed, STREAMED, only=question, max_batch_size=SIZE, max_wait=DEFAULT_WAIT, idle=idle
        )
        table.add(how, served.latencies[-1], (served.latencies[-1] - direct) * 1e3)
    found.tables["lone"] = table


async def _direct(question: str) -> float:
    """Return how long the call takes that carries *question* alone, made without a batcher."""
    loop = asyncio.get_running_loop()
    schema = answer_type(Label).single_schema
    start = loop.time()
    call = ChatCall(messages=messages(question), model=MODEL, schema=schema)
    await SimulatedTransport(model(dict(products()))).send(call, lambda _: None)
    return loop.time() - start


def findings(found: Report) -> list[str]:
    """Say what the tables say."""
    cells = {row[0]: row[2] for row in found.tables["lone"].rows}
    _, flush, wait, second = cells.values()
    alone = {row[0]: row[8] for row in found.tables["windows"].rows if row[1] == ALONE}
    single = (
        f'A lone request on an idle batcher waits {flush:.1f} ms longer than a call of its own with idle="flush", {wait:.1f} ms with '
        f'idle="wait"; one that comes while another is under way, {second:.1f} ms at max_wait {DEFAULT_WAIT * 1e3:.0f} ms.'
    )
    said = [single]
    for name, by_idle in found.samples["windows"].items():
        for idle, points in by_idle.items():
            at = {point[0]: point for point in points}
            (short, *default), (long, *longest) = at[DEFAULT_WAIT * 1e3], at[WINDOWS[-1] * 1e3]
            saved, more = (1 - each[-1] / alone[name] for each in (default, longest))
            said.append(
                f'{name.capitalize()} ({RATES[name]:g} items/s), idle="{idle}": max_wait {short:.0f} ms makes batches of '
                f"{default[0]:.2f} and saves {saved:.0%} of the tokens for {default[1]:.0f} ms of added wait; {long:.0f} ms makes "
                f"{longest[0]:.2f} and saves {more:.0%} for {longest[1]:.0f} ms. "
                f"p99 goes from {default[3]:.2f} to {longest[3]:.2f} s."
            )
    return said
