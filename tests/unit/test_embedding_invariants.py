"""Whatever happens to calls, replies and callers: no caller gets the vector of another text, and each of them ends."""

import asyncio
import random
from array import array

import pytest
from helpers import batcher_for
from vectors import LENGTH, VectorTransport, is_right, vector_of

import microbatch as mb

CALLERS = 1_000

ENDINGS = (mb.MalformedAnswer, mb.BadRequest, mb.TransportError, mb.DeadlineExceeded, mb.ShutDown, mb.BatcherClosed)


class World(VectorTransport):
    """An endpoint at which anything goes wrong now and then, as *draw* decides, at a *rate* of its calls."""

    def __init__(self, draw, rate, poison=()):
        super().__init__(self.spoil)
        self._draw = draw
        self._rate = rate
        self._poison = set(poison)
        self.wrong = 0

    async def embed(self, call):
        await asyncio.sleep(self._draw.choice([0.0, 0.01, 0.3]))
        if self._draw.random() < self._rate / 4:
            raise self._draw.choice(
                [
                    mb.ConnectFailed("reset"),
                    mb.ServerError("busy", status=503),
                    mb.RateLimited("slowly", status=429, retry_after=0.1),
                    mb.TransportTimeout("late"),
                ]
            )
        if self._poison.intersection(call.inputs):
            raise mb.BadRequest("an input is too long", status=400)
        if len(call.inputs) > 1 and self._draw.random() < self._rate / 8:
            raise mb.BadRequest("too many inputs", status=413)
        return await super().embed(call)

    def spoil(self, number, inputs, pairs):
        draw = self._draw
        if draw.random() >= self._rate:
            return pairs
        self.wrong += 1
        at = draw.randrange(len(pairs))
        index, vector = pairs[at]
        return draw.choice(
            [
                lambda: pairs[:at] + pairs[at + 1 :],  # one is missing
                lambda: [(place, found) for place, (_, found) in enumerate(pairs[:at] + pairs[at + 1 :])],  # renumbered
                lambda: [(place + 1, found) for place, (_, found) in enumerate(pairs)],  # shifted
                lambda: [*pairs, (len(pairs), vector)],
                lambda: [*pairs[:at], (draw.randrange(-2, len(pairs) + 2), vector), *pairs[at + 1 :]],
                lambda: [*pairs[:at], (None, vector), *pairs[at + 1 :]],
                lambda: [*pairs[:at], (index, vector[:-1]), *pairs[at + 1 :]],
                lambda: [(place, found[:2]) for place, found in pairs],
                lambda: [*pairs[:at], (index, None), *pairs[at + 1 :]],
                lambda: [*pairs[:at], (index, array("f", [float("nan")] * LENGTH)), *pairs[at + 1 :]],
                lambda: draw.sample(pairs, len(pairs)),  # which is no fault
                list,
            ]
        )()


async def run(seed, *, rate, close_at=None, cache=None):
    """Run many callers with random cancellations; return what each got, and the batcher."""
    draw = random.Random(seed)
    wanted = [f"text {draw.randrange(CALLERS)}" for _ in range(CALLERS)]
    world = World(draw, rate, poison={f"text {draw.randrange(CALLERS)}" for _ in range(3)})
    batcher = batcher_for(
        world,
        cache,
        max_wait=0.05,
        max_queued=draw.choice([300, 10_000]),
        retry=mb.RetryPolicy(base=0.01, budget=10.0),
        when_full="wait",
    )
    await batcher.open()
    tasks = []

    async def call(text):
        await asyncio.sleep(draw.random())
        return await batcher.embed(
            text,
            timeout=draw.choice([None, None, None, 2.0]),
            use_cache=draw.choice([True, True, False]),
            priority=draw.choice(["high", "normal", "normal", "low"]),
            tenant=draw.choice([None, "t"]),
            dimensions=LENGTH,  # or a wrong length could be the first that a lane sees
        )

    tasks += [asyncio.ensure_future(call(text)) for text in wanted]
    many = [f"many {number}" for number in range(200)]
    tasks.append(asyncio.ensure_future(batcher.embed_many(many, dimensions=LENGTH)))
    for task in draw.sample(tasks[:-1], CALLERS // 10):
        asyncio.get_running_loop().call_later(2 * draw.random(), task.cancel)
    if close_at is not None:
        await asyncio.sleep(close_at)
        await batcher.aclose(grace=0.1)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    await batcher.aclose()
    return wanted, many, found, batcher, world


def check(wanted, many, found, batcher, world):
    *found, of_many = found
    if isinstance(of_many, list):
        assert all(is_right(*pair) for pair in zip(of_many, many, strict=True))
    else:
        assert isinstance(of_many, ENDINGS), of_many
        of_many = []
    for one, text in zip(found, wanted, strict=True):
        if isinstance(one, mb.Embedding):
            assert one.vector == vector_of(text), text
        else:
            assert isinstance(one, (*ENDINGS, asyncio.CancelledError)), repr(one)
    stats = batcher.stats()
    assert stats.queued == stats.in_flight == 0
    assert stats.items == stats.answered + stats.failed + stats.cancelled
    assert not list(batcher._engine.lanes)
    assert not len(batcher._parts.in_flight)
    return found, of_many


@pytest.mark.promise(of="vectors")
@pytest.mark.parametrize("seed", range(6))
async def test_no_caller_gets_the_vector_of_another_text_whatever_goes_wrong(seed):
    ran = await run(seed, rate=0.4)
    found, of_many = check(*ran)
    _, _, _, batcher, world = ran
    assert world.wrong > 5
    answered = sum(isinstance(one, mb.Embedding) for one in found)
    assert answered > CALLERS // 2
    shares = sum(one.usage.prompt_tokens for one in [*found, *of_many] if isinstance(one, mb.Embedding))
    stats = batcher.stats()
    assert shares + stats.unclaimed.prompt_tokens == stats.prompt_tokens == world.tokens


@pytest.mark.promise(of="vectors")
@pytest.mark.parametrize("seed", range(6))
async def test_each_caller_ends_when_the_batcher_closes_in_the_middle(seed):
    check(*await run(seed, rate=0.4, close_at=random.Random(seed).random()))


@pytest.mark.promise(of="vectors")
async def test_no_wrong_vector_gets_into_the_cache():
    cache = mb.MemoryCache()
    check(*await run(7, rate=0.5, cache=cache))
    async with batcher_for(VectorTransport(), cache) as batcher:
        texts = [f"text {number}" for number in range(CALLERS)]
        found = await batcher.embed_many(texts, dimensions=LENGTH)
        assert batcher.stats().cache_hits > CALLERS // 20
    assert all(is_right(*pair) for pair in zip(found, texts, strict=True))
