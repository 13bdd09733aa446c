"""The loads under which time is measured: everybody at once, and a crowd that asks again as soon as it is answered."""

from __future__ import annotations

import asyncio
import gc
from typing import TYPE_CHECKING, Any

import msgspec

from bench.timing import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bench.overhead.entries import Entry, Running

    Loops = Callable[[], asyncio.AbstractEventLoop]

WINDOW = 0.005
"""Longest wait for company, in seconds."""

BURST = 20_000
BURST_SIZES = (32, 16, 256)  # the first also warms up what the process does only once
STEADY_SIZE = 32
WORKERS, TIMES = 256, 40

PATIENCE = 120.0
"""Seconds after which a run counts as hanging."""


class Run(msgspec.Struct):
    """What one run took, for each item.

    Attributes:
        wall_us: Microseconds that passed.
        cpu_us: Microseconds of processor time.
        batch: Items in a batch on average; None of those who make none.
        backend_us: Microseconds of the backend's own; None where it is next to nothing.
    """

    wall_us: float
    cpu_us: float
    batch: float | None
    backend_us: float | None


class Pair(msgspec.Struct):
    """A run, and one of the bare floor right before it."""

    floor: Run
    own: Run


class Load(msgspec.Struct, frozen=True):
    """One way to ask, for one size of batch."""

    name: str
    size: int
    play: Callable[[Running], Any]

    def pair(self, entry: Entry, floor: Entry, loops: Loops | None) -> Pair:
        """Measure *entry* next to the floor: a busy second of the machine strikes both."""
        base = self.run(floor, loops)
        gc.collect()
        return Pair(base, self.run(entry, loops))

    def run(self, entry: Entry, loops: Loops | None) -> Run:
        """Measure *entry* in a loop of its own, and see to it that each got the answer to what it asked."""

        async def measured() -> Run:
            async with asyncio.timeout(PATIENCE):
                running = entry.make(self.size, WINDOW, None)
                await running.start()
                watch, answers = await self.play(running)
                await running.stop()
            check(running, answers)
            backend, items = running.backend, len(answers)
            if entry.exact and self.play is not steady and backend.calls != -(-items // self.size):
                raise AssertionError(f"{entry.name}: {backend.calls} calls for {items} items, {self.size} at a time")
            return Run(
                watch.wall / items * 1e6,
                watch.cpu / items * 1e6,
                items / backend.calls if backend.calls else None,
                None if backend.spent is None else backend.spent / items * 1e6,
            )

        with asyncio.Runner(loop_factory=loops) as runner:
            return runner.run(measured())


async def burst(running: Running) -> tuple[Stopwatch, list[Any]]:
    with Stopwatch() as watch:
        answers = await asyncio.gather(*map(running.submit, range(BURST)))
    return watch, answers


async def bare_tasks(running: Running) -> tuple[Stopwatch, list[Any]]:
    """The same burst without `gather`, whose own work for each item is no small part of the floor."""
    loop = asyncio.get_running_loop()
    with Stopwatch() as watch:
        tasks = [loop.create_task(running.submit(number)) for number in range(BURST)]
        for task in tasks:
            await task
    return watch, [task.result() for task in tasks]


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
    """Raise unless *answers* are those to 0, 1, 2..."""
    for number, answer in enumerate(answers):
        if answer != running.wanted(number):
            raise AssertionError(f"{number} was answered {answer!r} instead of {running.wanted(number)!r}")


LOADS = (*(Load(f"burst {size}", size, burst) for size in BURST_SIZES), Load("steady", STEADY_SIZE, steady))
BARE = Load("burst 32 of bare tasks", 32, bare_tasks)
"""Tells how much of the other bursts is `gather`; is in no table."""
