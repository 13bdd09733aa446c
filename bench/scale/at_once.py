"""A thousand lanes at once, all with work, for 64 calls: what they cost, how full their batches are, and whether all are served.

Beside that: as many items in one lane; and what a user would write who has a collector but no lanes, a minimal one for each system
message, all behind one semaphore.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import microbatch as mb
from bench.apart import measured
from bench.peers.floors import Minimal
from bench.report import Column, Table
from bench.scale.echo import SYSTEM, Echo, ask, check
from bench.timing import alternate, quantile, ratios

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bench.report import Report

    Submit = Callable[[int, str], Awaitable[str]]

LANES = 1_000
PER_LANE = 32
"""Requests of each lane: two full batches, so that it can be seen whether one lane gets its second before another its first."""

SIZE, CALLS = 16, 64
"""The defaults of `FlushPolicy`, which the others are given as well."""

PAUSE_S = 0.02
"""How long the endpoint takes: long enough for lanes to queue for calls, short enough for the processor to matter."""

WINDOW_S = 0.1
FLOOD = 8_000
"""Requests of one lane that are there before the other lanes ask for theirs."""

QUANTILES = [step / 20 for step in range(21)]
FIRST_MEDIAN_LAST = (0, 10, 20)
"""Where those are among the quantiles."""

PATIENCE = 120.0

OURS, ONE_LANE, COLLECTORS = "1,000 lanes", "one lane", "1,000 minimal collectors"
_LANE = re.compile(r"^Lane (\d+)\.")


class Watched(Echo):
    """Notes whose calls came, in order.

    Attributes:
        order: The lane of each call.
    """

    def __init__(self) -> None:
        super().__init__(PAUSE_S)
        self.order: list[int] = []

    async def send(self, call, on_text):
        self.order.append(int(_LANE.match(call.messages[0]["content"])[1]))
        return await super().send(call, on_text)


def system(lane: int) -> str:
    return f"Lane {lane}. {SYSTEM}"


async def load(submit: Submit, lanes: int, per_lane: int) -> tuple[float, list[float]]:
    """Have all ask at once, lane by lane in turn; return the seconds that took, and when each lane was done."""
    done = [0.0] * lanes
    start = time.perf_counter()

    async def caller(lane: int, text: str) -> None:
        check(await submit(lane, text), text)
        done[lane] = time.perf_counter() - start

    callers = [caller(lane, f"item {number} of {lane}") for number in range(per_lane) for lane in range(lanes)]
    await asyncio.gather(*callers)
    return time.perf_counter() - start, done


async def in_lanes(lanes: int) -> dict[str, Any]:
    """Put all the items into *lanes* lanes of a batcher."""
    endpoint, count = Watched(), LANES * PER_LANE
    policy = mb.FlushPolicy(max_queued=count, max_batch_size=SIZE, max_concurrent_batches=CALLS, max_wait=WINDOW_S)
    async with mb.Microbatcher(endpoint, policy=policy, tokens="bytes") as batcher:

        async def submit(lane: int, text: str) -> str:
            return (await batcher.submit(ask(text, system(lane)))).text

        took, done = await load(submit, lanes, count // lanes)
        assert batcher.stats().answered == count
    return told(took, done, endpoint, count)


async def in_collectors() -> dict[str, Any]:
    """Give every lane a minimal collector, and let the semaphore pick whose turn it is."""
    endpoint, count, slots = Watched(), LANES * PER_LANE, asyncio.Semaphore(CALLS)

    async def answer(lane: int, texts: list[str]) -> list[str]:
        async with slots:
            endpoint.order.append(lane)
            endpoint.calls += 1
            endpoint.items += len(texts)
            await asyncio.sleep(PAUSE_S)
        return texts

    collectors = [Minimal(partial(answer, lane), SIZE, WINDOW_S) for lane in range(LANES)]
    for collector in collectors:
        await collector.start()

    async def submit(lane: int, text: str) -> str:
        ask(text, system(lane))  # messages are made here as well
        return await collectors[lane].submit(text)

    took, done = await load(submit, LANES, PER_LANE)
    for collector in collectors:
        await collector.stop()
    return told(took, done, endpoint, count)


def told(took: float, done: list[float], endpoint: Watched, count: int) -> dict[str, Any]:
    """Return what is looked at: seconds, fill, and who was served when."""
    first: dict[int, int] = {}
    for at, lane in enumerate(endpoint.order, 1):
        first.setdefault(lane, at)
    assert endpoint.items == count, endpoint.items
    return {
        "items_per_s": count / took,
        "calls": endpoint.calls,
        "fill": endpoint.items / endpoint.calls,
        "served": len(first),
        "all_served_by_call": max(first.values()),
        "lane_done_s": [quantile(done, share) for share in QUANTILES],
    }


async def flooded() -> dict[str, Any]:
    """Let one lane ask for thousands of items, and then each of the others for one."""
    endpoint = Watched()
    policy = mb.FlushPolicy(max_queued=FLOOD + LANES, max_batch_size=SIZE, max_concurrent_batches=CALLS)
    async with mb.Microbatcher(endpoint, policy=policy, tokens="bytes") as batcher:

        async def caller(lane: int, text: str) -> None:
            check((await batcher.submit(ask(text, system(lane)))).text, text)

        async with asyncio.TaskGroup() as group:
            for number in range(FLOOD):
                group.create_task(caller(0, f"item {number}"))
            await asyncio.sleep(0)  # all of the flood has been accepted when the others come
            for lane in range(1, LANES):
                group.create_task(caller(lane, "the only item"))
    order = endpoint.order
    last = max(at for at, lane in enumerate(order) if lane)
    return {
        "flood_calls_before_last": order[:last].count(0),
        "flood_calls": order.count(0),
        "others": len(set(order)) - 1,
    }


def measure(found: Report, rounds: int) -> None:
    """Fill in the table of lanes at once."""
    cases = {
        OURS: partial(measured, in_lanes, patience=PATIENCE, lanes=LANES),
        ONE_LANE: partial(measured, in_lanes, patience=PATIENCE, lanes=1),
        COLLECTORS: partial(measured, in_collectors, patience=PATIENCE),
    }
    samples = alternate(cases, rounds)
    table = found.tables["at_once"] = Table(
        (
            f"{LANES * PER_LANE:,} items at once, {CALLS} calls of {PAUSE_S * 1e3:g} ms, batches of up to {SIZE}, SIMULATED endpoint within "
            f"the process, medians of {rounds} rounds"
        ),
        [
            Column("way"),
            Column("items/s", ",.0f"),
            Column(f"x {ONE_LANE}", ".2f"),
            Column("calls", ",.0f"),
            Column("mean batch", ".2f"),
            Column("lanes served", ",d"),
            Column("all served once by call", ",.0f"),
            Column("first lane done s", ".2f"),
            Column("median", ".2f"),
            Column("last", ".2f"),
        ],
        notes=[
            (
                f"{CALLS} calls of {PAUSE_S * 1e3:g} ms bear at most "
                f"{CALLS * SIZE / PAUSE_S:,.0f} items/s, so the processor is what binds. {COLLECTORS}: no prompts are composed and no "
                "replies are read there; it is a floor."
            ),
        ],
    )
    for way, taken in samples.items():
        rate = [each["items_per_s"] for each in taken]
        base = [each["items_per_s"] for each in samples[ONE_LANE]]
        table.add(
            way,
            statistics.median(rate),
            statistics.median(ratios(rate, base)),
            *(statistics.median(each[name] for each in taken) for name in ("calls", "fill")),
            min(each["served"] for each in taken),
            statistics.median(each["all_served_by_call"] for each in taken),
            *(statistics.median(each["lane_done_s"][at] for each in taken) for at in FIRST_MEDIAN_LAST),
        )
    found.samples["at_once"] = samples
    found.samples["flood"] = measured(flooded, patience=PATIENCE)


def findings(found: Report) -> list[str]:
    rows = {row[0]: row for row in found.tables["at_once"].rows}
    ours, theirs, flood = rows[OURS], rows[COLLECTORS], found.samples["flood"]
    return [
        (
            f"{LANES:,} lanes at once: {ours[1]:,.0f} items/s, {ours[2]:.2f} times what one lane bears, {ours[4]:.1f} items a call; "
            f"{theirs[0]} {theirs[1]:,.0f} items/s and {theirs[4]:.1f} a call."
        ),
        (
            f"Fairness: {ours[5]:,} of {LANES:,} lanes were served; every one had its first call among the first {ours[6]:,.0f} of "
            f"{ours[3]:,.0f} ({LANES:,} would be one each in turn; {theirs[0]}: {theirs[6]:,.0f} of {theirs[3]:,.0f})."
        ),
        (
            f"A flood of {FLOOD:,} items in one lane ahead of one item in each of {flood['others']:,} others: "
            f"{flood['flood_calls_before_last']} of the flood's {flood['flood_calls']} calls went before the last of the others'."
        ),
    ]
