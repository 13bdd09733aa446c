"""What several test files need."""

from __future__ import annotations

import asyncio
import time

import microbatch as mb
from microbatch.batching.scheduler import Scheduler

TRIES = 10


async def in_time(what, most):
    """Await *what* anew until it takes less than *most* seconds; return that time.

    A loaded machine is late now and then, and what is too slow by itself is so each time.
    """
    for _ in range(TRIES):
        begun = time.perf_counter()
        await what()
        took = time.perf_counter() - begun
        if took < most:
            return took
    raise AssertionError(f"{TRIES} times it took longer than {most:g} s, at last {took:g} s")


def ask(text, system="Shout."):
    """Messages with a shared instruction and one text of their own."""
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def batcher_for(transport, **policy):
    """A batcher that counts bytes, so that no test waits for a token table."""
    return mb.Microbatcher(transport, policy=mb.FlushPolicy(**policy), tokens="bytes")


class Tasks:
    """As much of a task group as a scheduler needs."""

    def start_soon(self, function, *args):
        self.last = asyncio.ensure_future(function(*args))


def scheduler_for(account, slots=64, *, begin=None):
    """Return a running scheduler for *account*; what it takes from a queue is left to the test."""

    async def do(work):
        pass

    scheduler = Scheduler(slots)
    scheduler.start(Tasks(), begin, do)
    account.slots = scheduler
    return scheduler
