"""Many callers leave at once: what that takes grows as their number does. Bytecodes of ours are counted, not time."""

import asyncio
import random
import sys
from collections import deque
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from helpers import ask, batcher_for

import microbatch as mb
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow


OURS = str(Path(mb.__file__).parent)


class Counted:
    """While it is entered, counts the bytecodes that code of ours executes."""

    def __init__(self):
        self.steps = 0

    def __enter__(self):
        sys.settrace(self._enter)
        return self

    def __exit__(self, *error):
        sys.settrace(None)

    def _enter(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._step

    def _step(self, frame, event, arg):
        self.steps += event == "opcode"
        return self._step


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def left(tasks, order):
    """Cancel *tasks* but the first in an order, let the batcher notice, and return the bytecodes that took."""
    first, *tasks = tasks
    if order == "newest first":
        tasks.reverse()
    elif order == "at random":
        random.Random(1).shuffle(tasks)
    with Counted() as counted:
        for task in tasks:
            task.cancel()
        await settle()
    assert all(task.cancelled() for task in tasks)
    first.cancel()
    await asyncio.wait([first])
    return counted.steps


@asynccontextmanager
async def busy(**policy):
    """Yield a batcher whose only slot is taken; what waits when it is left has to end."""
    batcher = batcher_for(ScriptedTransport(delay=3600), **{"max_concurrent_batches": 1, "idle": "wait", **policy})
    async with batcher:
        sent = asyncio.ensure_future(batcher.submit(ask("sent"), priority="high"))
        await settle()
        assert batcher.stats().in_flight == 1
        yield batcher
        await batcher.aclose(0)
        await asyncio.wait([sent])


async def waiting_in_a_lane(count, order, **policy):
    async with busy(max_wait=3000, **policy) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{number}"))) for number in range(count)]
        await settle()
        return await left(tasks, order)


async def in_a_full_lane(count, order):
    return await waiting_in_a_lane(count, order, max_batch_size=16)


async def in_a_lane_of_large_batches(count, order):
    return await waiting_in_a_lane(
        count, order, max_batch_size=100_000, max_batch_tokens=10**9, max_output_tokens=10**9
    )


async def in_a_lane_that_goes_on_filling(count, order):
    """The oldest stays; the others come and go in turn."""
    async with busy(max_wait=3000, max_batch_size=4) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("first")))
        await settle()
        waiting = deque(asyncio.ensure_future(batcher.submit(ask(f"{number}"))) for number in range(count))
        await settle()
        gone = []
        with Counted() as counted:
            for number in range(count):
                gone.append(waiting.popleft() if order == "oldest first" else waiting.pop())
                gone[-1].cancel()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                waiting.append(asyncio.ensure_future(batcher.submit(ask(f"again {number}"))))
                await asyncio.sleep(0)
        for task in [first, *waiting]:
            task.cancel()
        await asyncio.wait([first, *waiting, *gone])
        return counted.steps


async def alone(count, order):
    async with busy() as batcher:
        asked = (batcher.submit(ask(f"{number}"), params={"seed": 1}) for number in range(count))
        tasks = [asyncio.ensure_future(each) for each in asked]
        await settle()
        return await left(tasks, order)


async def waiting_for_room(count, order):
    async with busy(max_queued=2) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{number}"))) for number in range(count)]
        await settle()
        return await left(tasks, order)


async def followers_of_one_request(count, order):
    async with busy() as batcher:
        asked = (batcher.submit(ask("x"), temperature=0, timeout=100 + number % 7) for number in range(count))
        tasks = [asyncio.ensure_future(each) for each in asked]
        await settle()
        return await left(tasks, order)


async def followers_in_the_moment_of_their_answer(count, order):
    transport = ScriptedTransport(delay=1)
    async with batcher_for(transport) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask("x"), temperature=0)) for _ in range(count)]
        await settle()
        (ticket,) = next(iter(batcher._engine.scheduler.under_way.values())).tickets
        # They are cancelled in the turn in which their answers are there and not fetched yet.
        cancelled = asyncio.get_running_loop().create_future()

        def leave(_):
            for task in tasks[1:]:
                task.cancel()
            cancelled.set_result(None)

        ticket.future.add_done_callback(leave)
        with Counted() as counted:
            await cancelled
            await settle()
        assert all(task.cancelled() for task in tasks[1:])
    return counted.steps


async def asked_by_a_map(count, order):
    async with busy(max_queued=10**6) as batcher:
        results = batcher.map((ask(f"{number}") for number in range(count)), max_pending=count)
        reading = asyncio.ensure_future(anext(results))
        await settle()
        assert batcher.stats().queued == count + 1
        with Counted() as counted:
            reading.cancel()
            await asyncio.wait([reading])
            await settle()
        assert batcher.stats().queued == 1
        await results.aclose()
    return counted.steps


ORDERS = ["oldest first", "newest first", "at random"]
WHERE = [
    in_a_full_lane,
    in_a_lane_of_large_batches,
    in_a_lane_that_goes_on_filling,
    alone,
    waiting_for_room,
    followers_of_one_request,
    followers_in_the_moment_of_their_answer,
    asked_by_a_map,
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("where", WHERE)
async def test_what_it_takes_grows_as_the_number_of_those_who_leave(where, order):
    await where(10, order)  # Python 3.12 does not count code that it meets for the first time
    small, large = await where(100, order), await where(600, order)
    assert 0 < large < 7 * small, (small, large)  # six times as many
