"""What one way to batch costs when little happens: a lone request, twenty slow batches, nothing at all, and many that wait.

Each is measured in a process of its own, so that what others have left behind is neither counted nor waked.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from bench.apart import measured
from bench.overhead.entries import entries
from bench.overhead.loads import PATIENCE, WINDOW, check

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.overhead.entries import Entry

SIZE = 32
LONG_WINDOW = 0.05
ASKS = 3
"""How often a latency is measured; the median counts."""
SLOW, BATCHES = 0.05, 20
SETTLE = 0.2
"""Seconds after which nothing moves any more: many windows."""
OWN_TURNS = 2
"""Turns of the loop that a sleep takes: in one its timer fires, in the next its task goes on."""


class Quiet(msgspec.Struct):
    """What was found of one way to batch.

    Attributes:
        latency_ms: Of a request that has no company, under a window of 50 ms; the median of a few.
        batches_ms: Until 20 batches over a function of 50 ms are answered; the median too.
        wakeups: Turns of the loop in an idle second; None where they cannot be counted.
        idle_cpu_ms: Processor time of an idle second.
        waiting_bytes: Resident memory for each request while all wait, that of its task included.
        peak_bytes: The same when all are answered and the answers are kept, if that is more.
    """

    latency_ms: float
    batches_ms: float
    wakeups: float | None
    idle_cpu_ms: float
    waiting_bytes: float
    peak_bytes: float


class CountingSelector(selectors.DefaultSelector):
    """Counts how often the loop has waited, which is once a turn."""

    turns = 0

    def select(self, timeout: float | None = None) -> Any:
        self.turns += 1
        return super().select(timeout)


async def lone(entry: Entry) -> float:
    running = entry.make(SIZE, LONG_WINDOW, None)
    await running.start()
    took = []
    for number in range(ASKS):
        start = time.perf_counter()
        answer = await running.submit(number)
        took.append(time.perf_counter() - start)
        if answer != running.wanted(number):
            raise AssertionError(f"{number} was answered {answer!r}")
        await asyncio.sleep(2 * WINDOW)
    await running.stop()
    return statistics.median(took) * 1e3


async def slow_batches(entry: Entry) -> float:
    running = entry.make(SIZE, WINDOW, partial(asyncio.sleep, SLOW))
    await running.start()
    took = []
    for _ in range(ASKS):
        start = time.perf_counter()
        answers = await asyncio.gather(*map(running.submit, range(SIZE * BATCHES)))
        took.append(time.perf_counter() - start)
        check(running, answers)
    await running.stop()
    return statistics.median(took) * 1e3


async def idle(entry: Entry, seconds: float, selector: CountingSelector | None) -> tuple[float | None, float]:
    running = entry.make(SIZE, WINDOW, None)
    await running.start()
    await running.submit(0)  # so that what it starts late is started
    await asyncio.sleep(SETTLE)
    turns, cpu = selector.turns if selector else 0, time.process_time()
    await asyncio.sleep(seconds)
    cpu = time.process_time() - cpu
    woken = (selector.turns - turns - OWN_TURNS) / seconds if selector else None
    await running.stop()
    return woken, cpu / seconds * 1e3


async def memory(entry: Entry, pending: int) -> tuple[float, float]:
    def resident() -> int:
        return process.memory_info().rss

    process, gate = psutil.Process(), asyncio.Event()
    running = entry.make(SIZE, WINDOW, gate.wait)
    await running.start()
    loop = asyncio.get_running_loop()
    gc.collect()
    before = resident()
    tasks = [loop.create_task(running.submit(number)) for number in range(pending)]
    await asyncio.sleep(SETTLE)
    waiting = resident() - before
    if any(task.done() for task in tasks):
        raise AssertionError("a request did not wait")
    gate.set()
    for task in tasks:
        await task
    peak = max(waiting, resident() - before)
    check(running, [task.result() for task in tasks])
    await running.stop()
    return waiting / pending, peak / pending


def measure(name: str, loop: str, pending: int, seconds: float) -> dict[str, Any]:
    """Measure the one called *name*; return a `Quiet` as JSON has it."""
    entry = entries([name])[name]

    def run(case: Any, selector: CountingSelector | None = None) -> Any:
        async def patient() -> Any:
            async with asyncio.timeout(PATIENCE):
                return await case

        with asyncio.Runner(loop_factory=loops_of(loop, selector)) as runner:
            return runner.run(patient())

    # Memory first: what the others free would be taken again, and not counted.
    waiting, peak = run(memory(entry, pending))
    selector = CountingSelector() if loop == "asyncio" else None
    wakeups, cpu = run(idle(entry, seconds, selector), selector)
    found = Quiet(run(lone(entry)), run(slow_batches(entry)), wakeups, cpu, waiting, peak)
    return msgspec.to_builtins(found)


def loops_of(name: str, selector: selectors.BaseSelector | None = None) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes loops of the library *name*."""
    if name == "asyncio":
        return lambda: asyncio.SelectorEventLoop(selector)
    import uvloop

    return uvloop.new_event_loop


def all_quiet(
    names: list[str], loop: str, *, pending: int, seconds: float, at_once: int
) -> tuple[dict[str, Quiet], dict[str, str]]:
    """Measure each of *names* in its own process, so many *at once*; return what was found, and why some was not."""

    def child(name: str) -> Quiet | str:
        try:
            found = measured(measure, patience=5 * PATIENCE, name=name, loop=loop, pending=pending, seconds=seconds)
        except RuntimeError as error:
            return str(error).rpartition("\n")[2]  # the last line of a traceback tells what it was
        return msgspec.convert(found, Quiet)

    with ThreadPoolExecutor(at_once) as pool:
        ended = dict(zip(names, pool.map(child, names), strict=True))
    found = {name: end for name, end in ended.items() if isinstance(end, Quiet)}
    return found, {name: end for name, end in ended.items() if isinstance(end, str)}
