"""The cost when little happens: a lone request, nothing at all, and many that wait.

Each entry is measured in a process of its own, so that what others left behind is neither counted nor woken.
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil

from bench.apart import measured
from bench.overhead.entries import entries
from bench.overhead.loads import PATIENCE, WINDOW, check, loops_of

if TYPE_CHECKING:
    from bench.overhead.entries import Entry

SIZE = 32
LONG_WINDOW = 0.05
ASKS = 3
"""Latencies are medians of so many."""
SETTLE = 0.2
"""Seconds after which all timers have fired."""
OWN_TURNS = 2
"""Turns of the loop that a sleep takes: in one its timer fires, in the next its task goes on."""
IDLE_SECONDS = 1.0


class CountingSelector(selectors.DefaultSelector):
    """Count the waits of the loop, one per turn."""

    turns = 0

    def select(self, timeout: float | None = None) -> Any:
        self.turns += 1
        return super().select(timeout)


async def lone(entry: Entry) -> float:
    """Return the milliseconds until a request without others is answered."""
    running = entry.make(SIZE, LONG_WINDOW, None)
    await running.start()
    took = []
    for number in range(ASKS):
        start = time.perf_counter()
        answer = await running.submit(number)
        took.append(time.perf_counter() - start)
        assert answer == running.wanted(number)
        await asyncio.sleep(2 * WINDOW)
    await running.stop()
    return statistics.median(took) * 1e3


async def idle(entry: Entry, selector: CountingSelector | None) -> tuple[float | None, float]:
    """Return the turns of the loop in an idle second, None where they cannot be counted, and its processor milliseconds."""
    running = entry.make(SIZE, WINDOW, None)
    await running.start()
    await running.submit(0)  # starts what is started late
    await asyncio.sleep(SETTLE)
    turns, cpu = selector.turns if selector else 0, time.process_time()
    await asyncio.sleep(IDLE_SECONDS)
    cpu = time.process_time() - cpu
    woken = (selector.turns - turns - OWN_TURNS) / IDLE_SECONDS if selector else None
    await running.stop()
    return woken, cpu / IDLE_SECONDS * 1e3


async def memory(entry: Entry, pending: int) -> tuple[float, float]:
    """Return the resident bytes of a request, its task included, while all wait, and at most until all answers are kept."""
    process, gate = psutil.Process(), asyncio.Event()
    running = entry.make(SIZE, WINDOW, gate.wait)
    await running.start()
    loop = asyncio.get_running_loop()
    gc.collect()
    before = process.memory_info().rss
    tasks = [loop.create_task(running.submit(number)) for number in range(pending)]
    await asyncio.sleep(SETTLE)
    waiting = process.memory_info().rss - before
    if any(task.done() for task in tasks):
        raise AssertionError("a request did not wait")
    gate.set()
    for task in tasks:
        await task
    peak = max(waiting, process.memory_info().rss - before)
    check(running, [task.result() for task in tasks])
    await running.stop()
    return waiting / pending, peak / pending


def measure(name: str, loop: str, pending: int) -> dict[str, float | None]:
    entry = entries()[name]

    def run(case: Any, selector: CountingSelector | None = None) -> Any:
        async def patient() -> Any:
            async with asyncio.timeout(PATIENCE):
                return await case()

        with asyncio.Runner(loop_factory=loops_of(loop, selector)) as runner:
            return runner.run(patient())

    # Memory first: pages that the others free would be used again, and not counted.
    waiting, peak = run(partial(memory, entry, pending))
    selector = CountingSelector() if loop == "asyncio" else None
    wakeups, cpu = run(partial(idle, entry, selector), selector)
    return {
        "latency_ms": run(partial(lone, entry)),
        "wakeups": wakeups,
        "idle_cpu_ms": cpu,
        "waiting_bytes": waiting,
        "peak_bytes": peak,
    }


def all_quiet(names: list[str], loop: str, pending: int) -> dict[str, dict[str, float | None] | str]:
    """Return the figures of each of *names*, or the last line of its traceback if it failed."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = measured(measure, patience=5 * PATIENCE, name=name, loop=loop, pending=pending)
        except RuntimeError as error:
            found[name] = str(error).rpartition("\n")[2]
    return found
