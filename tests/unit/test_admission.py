"""Places in a full queue: given by priority and tenant in turn, and never lost."""

import asyncio
import collections

import pytest
from helpers import ask, batcher_for, each

import microbatch as mb
from microbatch.batching.admission import AdmissionQueue
from microbatch.batching.ticket import HIGH, LOW, NORMAL, UNSHARED
from microbatch.testing import ScriptedTransport


class Hostile(dict):
    """A message that raises when it is read."""

    def _raise(self, *_):
        raise ZeroDivisionError("hostile")

    __getitem__ = __iter__ = __len__ = get = items = keys = values = _raise


class HostileList(list):
    def __iter__(self):
        raise ZeroDivisionError("hostile")

    __getitem__ = __iter__


MISUSE = [
    [],
    None,
    7,
    [Hostile(role="user", content="x")],
    HostileList([{"role": "user", "content": "x"}]),
    collections.deque([{"role": "user", "content": "\ud800"}]),
    [{"role": "user", "content": "\ud800"}],
    [{"role": "user", "content": object()}],
]


async def settled(*tasks):
    done, pending = await asyncio.wait(tasks, timeout=60)
    assert not pending
    return [task.exception() or task.result() for task in done]


# --- never lost


@pytest.mark.parametrize("messages", MISUSE, ids=lambda messages: type(messages).__name__)
async def test_whatever_the_one_before_raises_the_next_gets_the_place(messages):
    async with batcher_for(ScriptedTransport(delay=1.0), max_queued=1) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("first")))
        await asyncio.sleep(0)
        bad = [asyncio.ensure_future(asyncio.wait_for(batcher.submit(messages), 50)) for _ in range(3)]
        await asyncio.sleep(0)
        good = asyncio.ensure_future(batcher.submit(ask("good")))
        await settled(first, good, *bad)
        assert good.result().output == "GOOD"
        for task in bad:
            assert not isinstance(task.exception(), TimeoutError)
        assert batcher.stats().queued == 0


async def test_a_relayed_request_that_is_misuse_passes_its_place_on():
    class Relay(ScriptedTransport):
        forward = None

    async with batcher_for(Relay(delay=1.0), max_queued=1) as batcher:
        Relay.forward = lambda *_: None  # never reached
        first = asyncio.ensure_future(batcher.submit(ask("first")))
        await asyncio.sleep(0)

        async def relay(headers, body):
            async with batcher.forward("POST", "/x", headers, body):
                pass

        bad = [asyncio.ensure_future(relay({}, {"model": "m"})), asyncio.ensure_future(relay(7, b"{}"))]
        await asyncio.sleep(0)
        good = asyncio.ensure_future(batcher.submit(ask("good")))
        await settled(first, good, *bad)
        assert good.result().output == "GOOD"


@each("asynchronous", [False, True])
@each("messages", MISUSE)
async def test_a_bad_item_of_a_map_is_its_own_error_and_passes_its_place_on(messages, asynchronous):
    async def slowly():
        for item in items:
            await asyncio.sleep(0.01)
            yield item

    items = [messages, ask("a"), mb.Request(messages), mb.Request(ask("b"), priority="urgent"), ask("c")]
    async with batcher_for(ScriptedTransport(delay=1.0), max_queued=1) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("first")))
        await asyncio.sleep(0)

        async def consume():
            return [result async for result in batcher.map(slowly() if asynchronous else items, ordered=True)]

        bulk = asyncio.ensure_future(consume())
        await asyncio.sleep(0.005)
        good = asyncio.ensure_future(batcher.submit(ask("good")))
        await settled(first, good, bulk)
        outcomes = [result.reply and result.reply.output for result in bulk.result()]
        assert outcomes == [None, "A", None, None, "C"]
        assert good.result().output == "GOOD"
        assert batcher.stats().queued == 0


async def test_a_caller_that_leaves_in_the_turn_it_is_let_in_passes_its_place_on():
    admission = AdmissionQueue(1)
    admission.occupied = 1
    first, second = (asyncio.ensure_future(wait(admission, NORMAL)) for _ in range(2))
    await asyncio.sleep(0)
    admission.release()
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    await asyncio.sleep(0)
    assert second.done()
    assert admission.occupied == 1


async def wait(admission, rank, tenant=None):
    await admission.acquire(rank, tenant, UNSHARED)


# --- in turn


async def served(callers, count):
    """Let *callers*, pairs of priority and tenant, wait for a place; return the first that get one, in order."""
    admission = AdmissionQueue(1)
    admission.occupied = 1_000
    order = []

    async def caller(rank, tenant):
        await wait(admission, rank, tenant)
        order.append((rank, tenant))

    tasks = [asyncio.ensure_future(caller(*each)) for each in callers]
    await asyncio.sleep(0)
    admission._sizes = [1_000] * 3
    for _ in range(count):
        admission.release()
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    return order


async def test_priorities_share_by_weight():
    order = await served([(rank, None) for rank in (LOW, NORMAL, HIGH) for _ in range(100)], 42)
    ranks = [rank for rank, _ in order]
    assert (ranks.count(HIGH), ranks.count(NORMAL), ranks.count(LOW)) == (32, 8, 2)


async def test_tenants_take_turns():
    order = await served([(NORMAL, "crowd")] * 50 + [(NORMAL, "loner")] * 3, 8)
    assert [tenant for _, tenant in order] == ["crowd", "loner"] * 3 + ["crowd"] * 2


async def test_callers_that_left_take_no_turn_and_no_memory():
    admission = AdmissionQueue(1)
    admission.occupied = 1
    crowd = [asyncio.ensure_future(wait(admission, NORMAL, f"tenant {i % 50}")) for i in range(10_000)]
    last = asyncio.ensure_future(wait(admission, NORMAL, "last"))
    await asyncio.sleep(0)
    for task in crowd:
        task.cancel()
    await asyncio.wait(crowd)
    assert admission.waiting == 1
    assert sum(map(len, admission._lines[NORMAL]._tenants.values())) <= 2
    admission.release()
    await last


# --- the reserve of high priority


@pytest.mark.parametrize("when_full", ["wait", "reject", "bypass"])
@pytest.mark.parametrize("size", [1, 500])
async def test_high_priority_has_a_small_reserve(when_full, size):
    options = {"max_queued": size, "when_full": when_full, "max_concurrent_batches": 4}
    async with batcher_for(ScriptedTransport(delay=1.0), **options) as batcher:
        low = [asyncio.ensure_future(batcher.submit(ask(f"{i}"), priority="low")) for i in range(size + 50)]
        await asyncio.sleep(0)
        reserve = max(1, size // 50)
        high = [asyncio.ensure_future(batcher.submit(ask(f"{i}"), priority="high")) for i in range(reserve + 1)]
        await asyncio.sleep(0)
        queued = batcher.stats().queued
        assert queued <= size + reserve + (4 if when_full == "bypass" else 0)
        assert queued >= size + reserve
        await asyncio.gather(*high[:reserve])
        rest = await asyncio.gather(high[-1], *low, return_exceptions=True)
        refused = [outcome for outcome in rest if isinstance(outcome, mb.Overloaded)]
        assert bool(refused) == (when_full != "wait")


async def test_a_caller_that_was_let_in_waits_for_company_though_high_priority_has_come_in_meanwhile():
    urgent = []

    async def answer(call):
        await asyncio.sleep(1.0)
        # Its first step comes between the step in which a place is granted and that in which it is taken.
        urgent.append(asyncio.ensure_future(batcher.submit(ask("urgent"), priority="high")))
        return call.items[0][1]

    transport = ScriptedTransport(answer, delay=0.0)
    async with batcher_for(transport, max_queued=1, idle="wait", max_wait=0.5) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("first"), priority="high"))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(batcher.submit(ask("second")))
        await first
        await asyncio.gather(second, *urgent)
        assert batcher.stats().singles_by_reason == {"high": 2, "no_company": 1}
    assert transport.calls[-1].started == 1.5
