"""Who holds a slot, and for how long: only a call on the wire, and no account to the cost of others."""

import asyncio

import pytest
from helpers import ask, batcher_for

import microbatch as mb
from microbatch.errors import RateLimited, ServerError, TransportTimeout
from microbatch.testing import ScriptedTransport

A = {"headers": {"Authorization": "Bearer A"}, "tenant": "A"}
B = {"headers": {"Authorization": "Bearer B"}, "tenant": "B"}


class Endpoint(ScriptedTransport):
    """Answers in half a second, but calls with the key of A as it is told."""

    def __init__(self, trouble=None, delay=0.5):
        super().__init__(delay=delay)
        self.trouble = trouble
        self.peak = self.now = 0
        self.begun = []

    async def send(self, call, on_text):
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            if call.headers.get("authorization") == "Bearer A" and self.trouble is not None:
                self.begun.append(asyncio.get_running_loop().time())
                await self.trouble(call)
            return await super().send(call, on_text)
        finally:
            self.now -= 1


async def timed(coroutine):
    loop = asyncio.get_running_loop()
    start = loop.time()
    await coroutine
    return loop.time() - start


async def drop(tasks):
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def limited_until(end):
    """The key of A is rate limited until *end*, and says so."""

    async def trouble(_call):
        now = asyncio.get_running_loop().time()
        if now < end:
            await asyncio.sleep(0.2)
            raise RateLimited("slow down", status=429, retry_after=end - now)

    return trouble


async def p99(batcher, priority, seconds=40.0):
    """Return the 99th percentile of what tenant B waits, asking every 50 ms for some seconds."""
    tasks = []
    for number in range(int(seconds / 0.05)):
        tasks.append(asyncio.ensure_future(timed(batcher.submit(ask(f"{number}"), priority=priority, **B))))
        await asyncio.sleep(0.05)
    return sorted(await asyncio.gather(*tasks))[int(len(tasks) * 0.99)]


@pytest.mark.slow
@pytest.mark.promise(of="fair")
@pytest.mark.parametrize("priority", ["normal", "high"])
@pytest.mark.parametrize("kind", ["lanes", "one lane", "high"])
async def test_a_rate_limited_account_costs_another_tenant_nothing(priority, kind):
    loop = asyncio.get_running_loop()
    async with batcher_for(Endpoint()) as batcher:
        alone = await p99(batcher, priority)
    endpoint = Endpoint()
    async with batcher_for(endpoint) as batcher:
        for number in range(300):
            await batcher.submit(ask(f"{number}"), **A)
        endpoint.trouble = limited_until(loop.time() + 60)
        options = {**A, "priority": "high" if kind == "high" else "normal"}
        system = (lambda number: "Shout.") if kind == "one lane" else (lambda number: f"lane {number}")
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}", system(i)), **options)) for i in range(2_000)]
        await asyncio.sleep(1)
        beside = await p99(batcher, priority)
        await drop(tasks)
    assert beside <= 1.2 * alone


@pytest.mark.promise(of="fair")
async def test_a_model_that_stalls_leaves_others_the_overdraft():
    async def stall(call):
        await asyncio.sleep(600)
        raise TransportTimeout("no answer")

    endpoint = Endpoint(stall)
    async with batcher_for(endpoint, max_concurrent_batches=8) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask("x", f"lane {i}"), **A)) for i in range(100)]
        await asyncio.sleep(1)
        assert endpoint.now == 8
        normal = asyncio.ensure_future(timed(batcher.submit(ask("n"), **B)))
        high = asyncio.ensure_future(timed(batcher.submit(ask("h"), priority="high", **B)))
        low = asyncio.ensure_future(timed(batcher.submit(ask("l", "other"), priority="low", model="m", **B)))
        assert await normal == await high == 0.5
        assert await low <= 2.5 + 0.5
        assert endpoint.peak <= 8 + 2
        await drop(tasks)


async def test_a_call_that_backs_off_holds_no_slot_and_its_retry_comes_before_new_work():
    loop = asyncio.get_running_loop()
    failures = iter([ServerError("busy", status=503, retry_after=10.0)])

    async def once(call):
        if (failure := next(failures, None)) is not None:
            raise failure

    endpoint = Endpoint(once)
    async with batcher_for(endpoint, max_concurrent_batches=1, max_batch_size=1) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("first"), **A))
        await asyncio.sleep(1)
        assert batcher.stats().in_flight == 0
        assert await timed(batcher.submit(ask("x"), **B)) == 0.5
        waiting = [asyncio.ensure_future(batcher.submit(ask(f"{i}"), **A)) for i in range(3)]
        await first
        assert loop.time() < 10.0 + 0.5 + 1.0
        assert not any(task.done() for task in waiting)
        await asyncio.gather(*waiting)


async def test_during_an_outage_requests_wait_unsent():
    async def down(call):
        if asyncio.get_running_loop().time() < 20:
            raise ServerError("down", status=503, retry_after=30.0)

    endpoint = Endpoint(down)
    async with batcher_for(endpoint, max_batch_size=1) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"), **A)) for i in range(8)]
        await asyncio.sleep(1)
        later = [asyncio.ensure_future(batcher.submit(ask(f"later {i}"), **A)) for i in range(500)]
        await asyncio.sleep(5)
        (account,) = batcher._parts.accounts._kept.values()
        assert account.begun == account.backing_off == 8
        assert batcher.stats().in_flight == 0
        await drop(later[:400])  # unsent, so nothing of them was paid
        answers = await asyncio.gather(*tasks, *later[400:])
        assert len(answers) == 108
    assert not {f"later {i}" for i in range(400)} & {text for call in endpoint.calls for _, text in call.items}


async def test_an_account_begins_no_more_calls_than_there_are_slots():
    begun = set()

    async def busy(call):
        text = call.messages[-1]["content"]
        if text not in begun:
            begun.add(text)
            raise ServerError("busy", status=503, retry_after=5.0)

    endpoint = Endpoint(busy)
    policy = mb.FlushPolicy(max_concurrent_batches=4, max_batch_size=1)
    retry = mb.RetryPolicy(reserve=100)
    async with mb.Microbatcher(endpoint, policy=policy, retry=retry, tokens="bytes") as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"), **A)) for i in range(40)]
        await asyncio.sleep(4)
        assert len(begun) == 4
        await asyncio.gather(*tasks)
        (account,) = batcher._parts.accounts._kept.values()
        assert account.begun == account.on_wire == account.backing_off == 0


@pytest.mark.slow
@pytest.mark.promise(of="fair")
@pytest.mark.parametrize("when_full", ["wait", "reject", "bypass"])
async def test_with_a_full_queue_of_low_priority_a_high_request_waits_one_call_at_most(when_full):
    policy = {"max_concurrent_batches": 4, "max_queued": 1_000, "when_full": when_full}
    async with batcher_for(Endpoint(delay=1.0), **policy) as batcher:
        noisy = [
            asyncio.ensure_future(batcher.submit(ask(f"{i}"), tenant="noisy", priority="low")) for i in range(10_000)
        ]
        await asyncio.sleep(0.5)
        times = await asyncio.gather(
            *(timed(batcher.submit(ask(f"h{i}"), tenant="quiet", priority="high")) for i in range(4))
        )
        assert max(times) <= 1.0 + 1.0
        await drop(noisy)


async def test_fallback_calls_take_slots_of_their_own_and_do_not_deadlock():
    def half(call):
        return (
            call.reply([(name, text.upper()) for name, text in call.items[::2]])
            if call.combined
            else call.items[0][1].upper()
        )

    transport = ScriptedTransport(*[half] * 1_000, delay=0.1)
    async with batcher_for(transport, max_concurrent_batches=1, max_batch_size=8, idle="wait") as batcher:
        answers = await asyncio.gather(*(batcher.submit(ask(f"x{i}")) for i in range(64)))
    assert [reply.output for reply in answers] == [f"X{i}" for i in range(64)]


async def test_a_fallback_call_is_not_made_for_callers_that_left_while_it_waited_for_its_slot():
    gates = {"first": asyncio.Event(), "slow": asyncio.Event()}

    async def first(call):
        await gates["first"].wait()
        return call.reply([(call.items[0][0], "A")])

    async def slow(call):
        await gates["slow"].wait()
        return "SLOW"

    transport = ScriptedTransport(first, slow)
    async with batcher_for(transport, max_concurrent_batches=1, max_wait=0.01, idle="wait") as batcher:
        crowd = {text: asyncio.ensure_future(batcher.submit(ask(text), **A)) for text in "abcdef"}
        await asyncio.sleep(1)
        other = asyncio.ensure_future(batcher.submit(ask("slow"), **B))
        await asyncio.sleep(1)
        gates["first"].set()
        await asyncio.sleep(1)  # the slot has gone to the other account, and the fallback waits for it
        assert [call.combined for call in transport.calls] == [True, False]
        gone = [crowd.pop(text) for text in "bc"]
        await drop(gone)
        gates["slow"].set()
        await asyncio.gather(other, *crowd.values())
        assert {text for call in transport.calls[2:] for _, text in call.items} == set("def")
        assert any(call.combined for call in transport.calls[2:])


async def test_a_fallback_call_for_nobody_waits_for_no_slot():
    gates = [asyncio.Event(), asyncio.Event()]

    async def nothing(call):
        await gates[0].wait()
        return call.reply([])

    async def slow(call):
        await gates[1].wait()
        return "SLOW"

    transport = ScriptedTransport(nothing, slow)
    async with batcher_for(transport, max_concurrent_batches=1, max_wait=0.01, idle="wait") as batcher:
        pair = [asyncio.ensure_future(batcher.submit(ask(text), **A)) for text in "ab"]
        await asyncio.sleep(1)
        other = asyncio.ensure_future(batcher.submit(ask("slow"), **B))
        await asyncio.sleep(1)
        gates[0].set()
        await asyncio.sleep(1)
        await drop(pair)
        await asyncio.sleep(1)
        assert len(batcher._engine.scheduler.under_way) == 1
        gates[1].set()
        await other
    assert len(transport.calls) == 2
