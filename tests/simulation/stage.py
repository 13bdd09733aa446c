"""What every simulated run has: a shuffled loop on virtual time, a trace, and the tasks of its callers."""

from __future__ import annotations

import asyncio
import gc
import logging
from random import Random
from typing import TYPE_CHECKING, Any

from simulation.loop import ShuffledLoop, Steady, Stuck

if TYPE_CHECKING:
    from collections.abc import Mapping

    import microbatch as mb
    from microbatch.spending.spending import Charge


class Stage:
    """Base of a run, whose `_main` is to be written.

    Args:
        order: Seed of the order in which things of one turn happen, or None for asyncio's own.
        shuffled: Share of the turns that are shuffled.

    Attributes:
        trace: What happened: virtual time, turn, what, and details.
        stuck: Why the run could not go on, or None.
        leftover: What was left of the batchers after their end: tasks, timers.
        charges: What a budget was charged.
        overspent: Charges that exceeded it.
    """

    def __init__(self, order: int | None, shuffled: float) -> None:
        self.loop = ShuffledLoop(None if order is None else Random(order), shuffled)
        self.trace: list[tuple[Any, ...]] = []
        self.stuck: str | None = None
        self.leftover: list[str] = []
        self.charges: list[Charge] = []
        self.overspent: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    async def _main(self) -> None:
        raise NotImplementedError

    def now(self) -> float:
        """Return the virtual time."""
        return self.loop.time()

    def moment(self) -> int:
        """Return the place in the trace."""
        return len(self.trace)

    def note(self, *what: Any) -> None:
        """Add to the trace."""
        self.trace.append((self.loop.time(), self.loop.turns, *what))

    def _start(self, coroutine: Any) -> asyncio.Task[Any]:
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        return task

    def watch_charges(self, spending: Any, limits: Mapping[str, float]) -> None:
        """Note each charge, and what exceeds the budget's *limits*."""
        charge = spending.charge

        async def watched(expense):
            made = await charge(expense)
            if not isinstance(made, asyncio.Future):
                self.charges.append(made)
                spent = {"usd": made.counter.usd, "tokens": made.counter.tokens}
                self.note("charge", made.usd, made.tokens)
                self.overspent += [
                    f"{spent[name]} of {most} {name}"
                    for name, most in limits.items()
                    if name in spent and spent[name] > most * (1 + 1e-6)
                ]
            return made

        spending.charge = watched

    def run(self) -> None:
        """Play the scenario to its end."""
        loop, logger = self.loop, logging.getLogger("microbatch")
        silent, logger.disabled = logger.disabled, True
        # When the collector runs is no part of the scenario, and what it finalizes would join in.
        gc.disable()
        try:
            with Steady():
                loop.run_until_complete(self._main())
        except Stuck as stuck:
            self.stuck = str(stuck)
            self._abandon()
        finally:
            logger.disabled = silent
            loop.close()
            gc.enable()

    def _look_for_leftovers(self, batchers: list[mb.Microbatcher]) -> None:
        """Note what is left of *batchers*, which are closed."""
        for batcher in batchers:
            host = batcher._host._task
            if host is not None and host.done() and not host.cancelled() and host.exception() is not None:
                self.leftover.append(f"the batcher's own task died of {host.exception()!r}")
        left = asyncio.all_tasks() - {asyncio.current_task()}
        self.leftover += sorted(f"task {task.get_name()} {task.get_coro().__qualname__}" for task in left)
        timers = {timer._callback for timer in self.loop._scheduled if not timer._cancelled}
        # That of a call whose usage was waited for does nothing, once the call is over; an answer that was stored is forgotten soon.
        names = {timer.__qualname__ for timer in timers if str(timer.__module__).startswith("microbatch")} - {
            "AnswerCache._forget",
            "Exchange._stop",
        }
        self.leftover += sorted(f"timer {name}" for name in names)

    def _abandon(self) -> None:
        """End what is left of a run that got stuck, quietly."""
        loop = self.loop
        loop.set_exception_handler(lambda *_: None)
        loop.limited = False

        async def end() -> None:
            for _ in range(20):
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task._log_destroy_pending = False
                    task.cancel()
                for _ in range(20):
                    await asyncio.sleep(0)

        loop.run_until_complete(end())
