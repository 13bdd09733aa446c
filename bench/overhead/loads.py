"""The loads under which time is measured: all at once, and workers that ask again as soon as they are answered."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.timing import Stopwatch

if TYPE_CHECKING:
    import selectors
    from collections.abc import Callable, Iterable

    from bench.overhead.entries import Entry, Running

    Loops = Callable[[], asyncio.AbstractEventLoop]

WINDOW = 0.005
"""Longest wait for further requests, in seconds."""

BURST = 20_000
BURST_SIZES = (32, 16, 256)  # the first also warms up what the process does only once
STEADY_SIZE = 32
WORKERS, TIMES = 256, 40

PATIENCE = 120.0
"""Seconds after which a run counts as hanging."""


class Load(NamedTuple):
    name: str
    size: int
    play: Callable[[Running], Any]


def pair(load: Load, entry: Entry, floor: Entry, loops: Loops) -> dict[str, dict[str, float | None]]:
    """Measure the floor and *entry* right after it, so that other load on the machine affects both."""
    base = measure(load, floor, loops)
    gc.collect()
    return {"floor": base, "own": measure(load, entry, loops)}


def measure(load: Load, entry: Entry, loops: Loops) -> dict[str, float | None]:
    """Return what one run took per item, in a loop of its own; every answer is checked.

    Returns:
        `wall_us` and `cpu_us`, and `batch`, the mean number of items in a batch, None where there are none.
    """

    async def measured() -> dict[str, float | None]:
        async with asyncio.timeout(PATIENCE):
            running = entry.make(load.size, WINDOW, None)
            await running.start()
            watch, answers = await load.play(running)
            await running.stop()
        check(running, answers)
        calls, items = running.calls, len(answers)
        if entry.exact and load.play is burst and calls != -(-items // load.size):
            raise AssertionError(f"{calls} calls for {items} items, {load.size} at a time")
        return {
            "wall_us": watch.wall / items * 1e6,
            "cpu_us": watch.cpu / items * 1e6,
            "batch": items / calls if calls else None,
        }

    with asyncio.Runner(loop_factory=loops) as runner:
        return runner.run(measured())


async def burst(running: Running) -> tuple[Stopwatch, list[Any]]:
    with Stopwatch() as watch:
        answers = await asyncio.gather(*map(running.submit, range(BURST)))
    return watch, answers


async def steady(running: Running) -> tuple[Stopwatch, list[Any]]:
    submit = running.submit

    async def worker(first: int) -> list[Any]:
        return [await submit(number) for number in range(first, first + TIMES)]

    loop = asyncio.get_running_loop()
    with Stopwatch() as watch:
        tasks = [loop.create_task(worker(first)) for first in range(0, WORKERS * TIMES, TIMES)]
        for task in tasks:
            await task
    return watch, [answer for task in tasks for answer in task.result()]


def check(running: Running, answers: Iterable[Any]) -> None:
    """Raise AssertionError unless *answers* are those to 0, 1, 2..."""
    for number, answer in enumerate(answers):
        if answer != running.wanted(number):
            raise AssertionError(f"{number} was answered {answer!r} instead of {running.wanted(number)!r}")


def loops_of(name: str, selector: selectors.BaseSelector | None = None) -> Loops:
    """Return the loop factory of the library *name*."""
    if name == "asyncio":
        return lambda: asyncio.SelectorEventLoop(selector)
    import uvloop

    return uvloop.new_event_loop


LOADS = (*(Load(f"burst {size}", size, burst) for size in BURST_SIZES), Load("steady", STEADY_SIZE, steady))
