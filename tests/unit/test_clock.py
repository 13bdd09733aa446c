"""`VirtualClockLoop`: the clock stands while a thread of an executor works."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import microbatch as mb
from microbatch.testing import ScriptedTransport, VirtualClockLoop


def run(work):
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(work)


async def at_work(working):
    """Await *working* under a timeout, while something else happens each minute; return its result and the time passed."""
    loop = asyncio.get_running_loop()
    minutes = []

    async def periodic():
        while True:
            await asyncio.sleep(60)
            minutes.append(loop.time())

    ticking = asyncio.ensure_future(periodic())
    async with asyncio.timeout(3600):
        result = await working()
    ticking.cancel()
    return result, loop.time(), minutes


def work():
    time.sleep(0.1)
    return "done"


def test_the_clock_stands_while_the_executor_works():
    assert run(at_work(lambda: asyncio.to_thread(work))) == ("done", 0.0, [])


def test_it_stands_for_any_executor_and_for_several_functions():
    async def both():
        with ThreadPoolExecutor(2) as pool:
            loop = asyncio.get_running_loop()
            return await asyncio.gather(*(loop.run_in_executor(pool, work) for _ in range(3)))

    assert run(at_work(both)) == (["done"] * 3, 0.0, [])


def test_it_goes_on_afterwards_also_after_an_error_or_a_refusal():
    async def failing():
        loop = asyncio.get_running_loop()
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        pool = ThreadPoolExecutor()
        pool.shutdown()
        with pytest.raises(RuntimeError, match="shutdown"):
            loop.run_in_executor(pool, work)
        assert loop.working == 0
        await asyncio.sleep(7)
        return loop.time()

    assert run(failing()) == 7.0


def test_a_cancelled_wait_for_a_thread_lets_the_clock_go_on():
    released = threading.Event()

    async def cancelled():
        loop = asyncio.get_running_loop()
        waiting = asyncio.ensure_future(asyncio.to_thread(released.wait))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(7)
        released.set()
        return loop.time()

    assert run(cancelled()) == 7.0


def test_a_batcher_opens_in_no_time():
    async def opened():
        async with asyncio.timeout(3600), mb.Microbatcher(ScriptedTransport()) as batcher:
            reply = await batcher.submit([{"role": "user", "content": "x"}])
        return reply.output, asyncio.get_running_loop().time()

    assert run(opened()) == ("X", 0.0)
