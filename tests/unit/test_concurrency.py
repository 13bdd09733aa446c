"""How many calls an endpoint bears at once, found out by trying."""

import asyncio

import pytest
from helpers import ask

import microbatch as mb
from microbatch.errors import BadRequest, ConnectFailed, RateLimited, ServerError, TransportTimeout
from microbatch.testing import ScriptedTransport
from microbatch.transports.guards import INITIAL, Concurrency


def round_of(concurrency, sent, now, error=None):
    """Let as many calls as are allowed end together."""
    for in_flight in range(int(concurrency.limit), 0, -1):
        concurrency.note(error, sent=sent, in_flight=in_flight, now=now)


def test_it_grows_by_about_one_with_each_round_of_successes():
    concurrency = Concurrency()
    for number in range(10):
        before = concurrency.limit
        round_of(concurrency, number, number + 0.5)
        assert concurrency.limit - before == pytest.approx(1.0, abs=0.1)


def test_it_does_not_grow_while_it_is_not_reached():
    concurrency = Concurrency()
    for number in range(1_000):
        concurrency.note(None, sent=number, in_flight=int(INITIAL) - 1, now=number)
    assert concurrency.limit == INITIAL


@pytest.mark.parametrize(
    ("error", "cut"),
    [
        (RateLimited("x", status=429), True),
        (ServerError("x", status=503), True),
        (ServerError("x", status=529), True),
        (TransportTimeout("x"), True),
        (ServerError("x", status=500), False),
        (ConnectFailed("x"), False),
        (BadRequest("x", status=400), False),
    ],
    ids=str,
)
def test_overload_halves_it_and_nothing_else_does(error, cut):
    concurrency = Concurrency()
    concurrency.note(error, sent=0.0, in_flight=5, now=1.0)
    assert concurrency.limit == (INITIAL / 2 if cut else INITIAL)


def test_one_overload_is_one_cut():
    concurrency = Concurrency()
    error = RateLimited("x", status=429)
    round_of(concurrency, 0.0, 1.0, error)
    assert concurrency.limit == INITIAL / 2
    round_of(concurrency, 2.0, 3.0, error)
    assert concurrency.limit == INITIAL / 4


def test_one_call_is_always_allowed():
    concurrency = Concurrency()
    for now in range(20):
        concurrency.note(RateLimited("x", status=429), sent=now + 0.5, in_flight=1, now=now + 1)
    assert concurrency.limit == 1.0
    assert concurrency.allows(0)
    assert not concurrency.allows(1)


# --- through the batcher


class Endpoint(ScriptedTransport):
    """Bears some calls at once, and refuses more."""

    def __init__(self, bears, **options):
        super().__init__(**options)
        self.bears = bears
        self.now = self.peak = self.refused = 0

    async def send(self, call, on_text):
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            if self.now > self.bears:
                await asyncio.sleep(0.1)
                self.refused += 1
                raise ServerError("overloaded", status=503)
            return await super().send(call, on_text)
        finally:
            self.now -= 1


async def ask_many(batcher, count):
    results = [result async for result in batcher.map(ask(f"{i}") for i in range(count))]
    assert all(result.reply for result in results)


async def test_without_it_all_slots_are_used_and_with_it_no_more_than_it_allows():
    policy = mb.FlushPolicy(max_batch_size=1)
    plain, adaptive = Endpoint(1_000, delay=1.0), Endpoint(1_000, delay=1.0)
    async with mb.Microbatcher(plain, tokens="bytes", policy=policy) as batcher:
        await ask_many(batcher, 100)
    async with mb.Microbatcher(
        adaptive, tokens="bytes", policy=policy, rate_limit=mb.RateLimit(adaptive=True)
    ) as batcher:
        start = asyncio.get_running_loop().time()
        await ask_many(batcher, 61)
    assert plain.peak == 64
    assert [sum(call.started == start + second for call in adaptive.calls) for second in range(3)] == [20, 20, 21]


async def test_it_settles_at_what_the_endpoint_bears():
    endpoint = Endpoint(12, delay=1.0)
    policy = mb.FlushPolicy(max_batch_size=1)
    retry = mb.RetryPolicy(max_attempts=20, budget=10)
    options = {"tokens": "bytes", "policy": policy, "retry": retry, "rate_limit": mb.RateLimit(adaptive=True)}
    async with mb.Microbatcher(endpoint, **options) as batcher:
        await ask_many(batcher, 2_000)
        (account,) = batcher._parts.accounts._kept.values()
        assert account.on_wire == 0
        assert 6 <= account._concurrency.limit < 14
    assert asyncio.get_running_loop().time() < 2 * 2_000 / 12
    assert endpoint.refused < 200


async def test_callers_own_deadlines_do_not_lower_it():
    async def never(_):
        await asyncio.sleep(1_000)

    class Timely(ScriptedTransport):
        async def send(self, call, on_text):
            try:
                async with asyncio.timeout(call.timeout):
                    return await super().send(call, on_text)
            except TimeoutError:
                raise TransportTimeout("too slow") from None

    transport = Timely(*[never] * 50)
    async with mb.Microbatcher(transport, tokens="bytes", rate_limit=mb.RateLimit(adaptive=True)) as batcher:
        for number in range(10):
            with pytest.raises(mb.DeadlineExceeded):
                await batcher.submit(ask(f"{number}"), timeout=0.1 + number * 0.07)
        for _ in range(5):  # turns of the loop, no time
            await asyncio.sleep(0)
        (account,) = batcher._parts.accounts._kept.values()
        assert account._concurrency.limit == INITIAL
        assert account.on_wire == 0
