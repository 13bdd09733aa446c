"""Minutes on end against an endpoint that enforces its limits: not one 429, and hardly anything left unused.

The endpoint counts over any 60 seconds, and so does `Meter.peak_*`; what is used is measured over whole minutes after the first.
"""

import asyncio
import random

import pytest

import microbatch as mb
from microbatch.testing import Latency, SimulatedModel, SimulatedTransport
from microbatch.testing.quota import Quota

RPM, TPM = 1_000, 200_000
MINUTES = 6

WORDS = [
    "Product",
    "name",
    "with",
    "a",
    "few",
    "more",
    "words",
    "of",
    "description",
    "that",
    "vary",
    "a",
    "lot",
    "in",
    "length",
    "indeed",
]
LONG = "You sort the products of an online shop. " * 20


class Load:
    """Requests of one kind, for as long as the test lasts."""

    def __init__(self, words, system, seed=1, **options):
        self.random = random.Random(seed)
        self.words = words
        self.system = system
        self.options = options

    def request(self):
        # No two are alike, and the number keeps the model from having an answer ready.
        text = " ".join(self.random.choices(WORDS, k=self.random.randint(*self.words))) + f" {self.random.random()}"
        return mb.Request(
            [{"role": "system", "content": self.system}, {"role": "user", "content": text}], **self.options
        )

    def until(self, end):
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            yield self.request()


SINGLE = {"words": (3, 3), "system": "Sort."}
BATCH = {"words": (3, 80), "system": LONG}


def simulated(**options):
    return SimulatedModel(
        quota=Quota(rpm=RPM, tpm=TPM), latency=Latency(first_token=0.5, tokens_per_second=80), **options
    )


def batcher_for(model, limit, *, size=16, slots=64, **options):
    policy = mb.FlushPolicy(max_batch_size=size, max_concurrent_batches=slots, max_queued=100_000)
    return mb.Microbatcher(SimulatedTransport(model), policy=policy, rate_limit=limit, **options)


class Watch:
    """What the endpoint has charged by each whole minute."""

    def __init__(self, model):
        self.model = model
        self.marks = []

    def look(self):
        if asyncio.get_running_loop().time() >= 60 * (len(self.marks) + 1):
            meters = list(self.model._meters.values())
            total = sum(meter._admitted._total for meter in meters), sum(meter._tokens._total for meter in meters)
            self.marks.append((asyncio.get_running_loop().time(), *total))

    @property
    def used(self):
        """Shares of both limits used between the end of the first minute and that of the last."""
        (start, *before), (end, *after) = self.marks[0], self.marks[MINUTES - 2]
        minutes = (end - start) / 60
        return [
            (later - earlier) / minutes / limit for earlier, later, limit in zip(before, after, (RPM, TPM), strict=True)
        ]


async def consume(batcher, load, watch):
    async for result in batcher.map(load.until(60 * MINUTES)):
        result.unwrap()
        watch.look()


def assert_kept(model, watch):
    assert model.quota_refusals == 0
    assert model.peak_requests <= RPM
    assert model.peak_tokens <= TPM
    assert max(watch.used) >= 0.95
    return watch.used


@pytest.mark.parametrize("charge", ["reserved", "used"])
@pytest.mark.parametrize("max_tokens", [None, 16])
async def test_where_requests_bind(charge, max_tokens):
    model = simulated()
    watch = Watch(model)
    async with batcher_for(model, mb.RateLimit(rpm=RPM, tpm=TPM, charge=charge), size=1, slots=256) as batcher:
        await consume(batcher, Load(**SINGLE, max_tokens=max_tokens), watch)
        assert batcher.stats().retries == 0
    requests, _ = assert_kept(model, watch)
    assert requests >= 0.95


@pytest.mark.parametrize("charge", ["reserved", "used"])
@pytest.mark.parametrize("max_tokens", [None, 60])
async def test_where_tokens_bind(charge, max_tokens):
    model = simulated()
    watch = Watch(model)
    async with batcher_for(model, mb.RateLimit(rpm=RPM, tpm=TPM, charge=charge)) as batcher:
        await consume(batcher, Load(**BATCH, max_tokens=max_tokens), watch)
        assert batcher.stats().retries == 0
    requests, _ = assert_kept(model, watch)
    assert requests < 0.5


@pytest.mark.parametrize("kind", [SINGLE, BATCH], ids=["requests", "tokens"])
async def test_a_stream_of_submits(kind):
    model = simulated()
    watch = Watch(model)
    loop = asyncio.get_running_loop()
    load = Load(**kind)

    async def caller(batcher):
        while loop.time() < 60 * MINUTES:
            request = load.request()
            await batcher.submit(request.messages)
            watch.look()

    size, callers = (1, 64) if kind is SINGLE else (16, 640)
    async with batcher_for(model, mb.RateLimit(rpm=RPM, tpm=TPM), size=size, slots=64) as batcher:
        await asyncio.gather(*(caller(batcher) for _ in range(callers)))
    assert_kept(model, watch)


@pytest.mark.parametrize("kind", [SINGLE, BATCH], ids=["requests", "tokens"])
async def test_several_batchers_that_share_one_limit(kind):
    model = simulated()
    watch = Watch(model)
    limit = mb.RateLimit(rpm=RPM, tpm=TPM)
    size = 1 if kind is SINGLE else 16
    batchers = [batcher_for(model, limit, size=size) for _ in range(3)]
    for batcher in batchers:
        await batcher.open()
    await asyncio.gather(*(consume(batcher, Load(**kind, seed=i), watch) for i, batcher in enumerate(batchers)))
    for batcher in batchers:
        await batcher.aclose()
    assert_kept(model, watch)
    answered = [batcher.stats().answered for batcher in batchers]
    assert max(answered) <= 1.2 * min(answered)


async def test_a_batcher_of_large_calls_beside_one_of_small_calls():
    model = simulated()
    watch = Watch(model)
    limit = mb.RateLimit(rpm=RPM, tpm=TPM)
    small, large = batcher_for(model, limit, size=1, slots=256), batcher_for(model, limit, size=60)
    async with small, large:
        loads = (small, Load(**{**SINGLE, "words": (20, 20)})), (large, Load(**{**BATCH, "words": (60, 80)}, seed=2))
        await asyncio.gather(*(consume(batcher, load, watch) for batcher, load in loads))
    assert_kept(model, watch)
    assert large.stats().batches > MINUTES


@pytest.mark.parametrize("kind", [SINGLE, BATCH], ids=["requests", "tokens"])
async def test_two_halves_make_a_whole(kind):
    model = simulated()
    watch = Watch(model)
    size = 1 if kind is SINGLE else 16
    batchers = [batcher_for(model, mb.RateLimit(rpm=RPM, tpm=TPM, share=0.5), size=size) for _ in range(2)]
    async with batchers[0], batchers[1]:
        await asyncio.gather(*(consume(batcher, Load(**kind, seed=i), watch) for i, batcher in enumerate(batchers)))
    assert_kept(model, watch)


async def test_half_a_share_alone_uses_half():
    model = simulated()
    watch = Watch(model)
    async with batcher_for(model, mb.RateLimit(rpm=RPM, tpm=TPM, share=0.5), size=1, slots=256) as batcher:
        await consume(batcher, Load(**SINGLE), watch)
    assert model.quota_refusals == 0
    assert model.peak_requests <= RPM / 2
    assert watch.used[0] >= 0.95 / 2


async def test_large_and_small_requests_in_one_batcher():
    model = simulated()
    watch = Watch(model)
    small, large = Load(**SINGLE), Load(words=(2_000, 3_000), system="Sort.", max_tokens=2_000, params={"n": 1})

    def mixed():
        loop = asyncio.get_running_loop()
        while loop.time() < 60 * MINUTES:
            yield from (small.request() for _ in range(30))
            yield large.request()

    async with batcher_for(model, mb.RateLimit(rpm=RPM, tpm=TPM), size=1, slots=256) as batcher:
        async for result in batcher.map(mixed()):
            result.unwrap()
            watch.look()
    assert_kept(model, watch)


async def test_with_more_allowed_than_the_endpoint_grants_its_headers_are_followed():
    model = simulated()
    watch = Watch(model)
    async with batcher_for(model, mb.RateLimit(rpm=10 * RPM, tpm=10 * TPM), size=1, slots=8) as batcher:
        await consume(batcher, Load(**SINGLE), watch)
    assert model.quota_refusals < 20
    assert watch.used[0] >= 0.9
