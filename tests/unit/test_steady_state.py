"""Minutes on end against an endpoint that enforces its limits: not one 429, and hardly anything left unused.

The endpoint counts over any 60 seconds, and so does `Meter.peak_*`; what is used is measured over whole minutes after the first.
"""

import asyncio
import random
from collections import deque

import pytest

import microbatch as mb
from microbatch.messages import Limits, Usage
from microbatch.protocols import Completion
from microbatch.testing import Latency, ScriptedTransport, SimulatedModel, SimulatedTransport
from microbatch.testing.quota import Quota

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
]  # minutes on end are seconds of work, and many on a loaded machine

RPM, TPM = 1_000, 200_000
MINUTES = 3

WORDS = [
    "product",
    "name",
    "with",
    "a few",
    "more words of",
    "description",
    "that vary",
    "a lot",
    "in length",
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

    def __init__(self, model, learns=1):
        self.model = model
        self.learns = learns  # minutes
        self.marks = []

    def look(self):
        if asyncio.get_running_loop().time() >= 60 * (len(self.marks) + 1):
            meters = list(self.model._meters.values())
            total = sum(meter._admitted.total for meter in meters), sum(meter._tokens.total for meter in meters)
            self.marks.append((asyncio.get_running_loop().time(), *total))
            if len(self.marks) <= self.learns:
                self.refused_first = self.model.quota_refusals

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


LEAST = {"requests": 0.95, "tokens": 0.9}
"""What is used of a limit at least. What is left at the end of a window is too little for another combined call, which is charged with
the bound on its reply."""


def assert_kept(model, watch, *, learning=0, least=0.95):
    # At first nothing is known yet of the lengths of answers, and a whole minute's tokens may go on that.
    assert watch.refused_first <= learning
    assert model.quota_refusals == watch.refused_first
    assert model.peak_requests <= RPM
    assert model.peak_tokens <= TPM
    assert max(watch.used) >= least
    return watch.used


@pytest.mark.parametrize(("charge", "max_tokens"), [("reserved", None), ("used", 16)])
@pytest.mark.promise(of="limits")
async def test_where_requests_bind(charge, max_tokens):
    model = simulated()
    watch = Watch(model)
    async with batcher_for(model, mb.RateLimit(rpm=RPM, tpm=TPM, charge=charge), size=1, slots=256) as batcher:
        await consume(batcher, Load(**SINGLE, max_tokens=max_tokens), watch)
        assert batcher.stats().retries == 0
    requests, _ = assert_kept(model, watch)
    assert requests >= 0.95


# "used" is for endpoints that give back what was reserved and not used, by max_tokens or by the bound of a combined call; see below.
@pytest.mark.parametrize(("charge", "max_tokens"), [("reserved", None), ("reserved", 200)])
@pytest.mark.promise(of="limits")
async def test_where_tokens_bind(charge, max_tokens):
    model = simulated()
    watch = Watch(model)
    async with batcher_for(model, mb.RateLimit(rpm=RPM, tpm=TPM, charge=charge)) as batcher:
        await consume(batcher, Load(**BATCH, max_tokens=max_tokens), watch)
        assert batcher.stats().retries == 0
    requests, _ = assert_kept(model, watch, least=LEAST["tokens"])
    assert requests < 0.5


@pytest.mark.parametrize("kind", [SINGLE, BATCH], ids=["requests", "tokens"])
@pytest.mark.promise(of="limits")
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
    assert_kept(model, watch, least=LEAST["requests" if kind is SINGLE else "tokens"])


@pytest.mark.parametrize("kind", [SINGLE, BATCH], ids=["requests", "tokens"])
@pytest.mark.promise(of="limits")
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
    assert_kept(model, watch, least=LEAST["requests" if kind is SINGLE else "tokens"])
    answered = [batcher.stats().answered for batcher in batchers]
    # Of combined calls a minute grants few, so one more or less is much.
    assert max(answered) <= (1.2 if kind is SINGLE else 1.5) * min(answered)


async def test_a_batcher_of_large_calls_beside_one_of_small_calls():
    model = simulated()
    watch = Watch(model, learns=2)  # the first large replies take 40 s
    limit = mb.RateLimit(rpm=RPM, tpm=TPM)
    small, large = batcher_for(model, limit, size=1, slots=256), batcher_for(model, limit, size=60)
    async with small, large:
        loads = (small, Load(**{**SINGLE, "words": (20, 20)})), (large, Load(**{**BATCH, "words": (60, 80)}, seed=2))
        await asyncio.gather(*(consume(batcher, load, watch) for batcher, load in loads))
    # Up to a large call is unused while it waits for the room it needs, 4 % here, and the small ones wait out its debt.
    assert_kept(model, watch, learning=3, least=0.92)
    assert large.stats().batches > MINUTES


@pytest.mark.parametrize("kind", [SINGLE, BATCH], ids=["requests", "tokens"])
async def test_two_halves_make_a_whole(kind):
    model = simulated()
    watch = Watch(model)
    # Two to a batch: larger ones, with their bounds, are granted as soon as a minute allows, and so many at once.
    size = 1 if kind is SINGLE else 2
    batchers = [batcher_for(model, mb.RateLimit(rpm=RPM, tpm=TPM, share=0.5), size=size) for _ in range(2)]
    async with batchers[0], batchers[1]:
        await asyncio.gather(*(consume(batcher, Load(**kind, seed=i), watch) for i, batcher in enumerate(batchers)))
    # What is left at the end of a window is too little for another batch.
    assert_kept(model, watch, least=LEAST["requests" if kind is SINGLE else "tokens"])


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
    # While a large one waits for the room it needs, up to that much is unused: 2.5 % here.
    assert_kept(model, watch, least=0.94)


async def test_with_more_allowed_than_the_endpoint_grants_its_headers_are_followed():
    model = simulated()
    watch = Watch(model)
    async with batcher_for(model, mb.RateLimit(rpm=10 * RPM, tpm=10 * TPM), size=1, slots=64) as batcher:
        await consume(batcher, Load(**SINGLE), watch)
    assert model.quota_refusals < 20
    assert watch.used[0] >= 0.9


# --- endpoints that count differently


class Enforcer(ScriptedTransport):
    """Charges prompt + max_tokens, by a window that gives back what was not used, or a bucket that refills and does not."""

    def __init__(self, *, refills):
        super().__init__(delay=0.2)
        self.refills = refills
        self.level = float(TPM)
        self.at = 0.0
        self.window = deque()
        self.refused = self.used = self.charged = 0

    @property
    def left(self):
        now = asyncio.get_running_loop().time()
        if self.refills:
            self.level = min(TPM, self.level + (now - self.at) * TPM / 60)
            self.at = now
            return self.level
        while self.window and self.window[0][0] <= now - 60:
            self.charged -= self.window.popleft()[1]
        return TPM - self.charged

    async def send(self, call, on_text):
        now = asyncio.get_running_loop().time()
        prompt = sum(len(message["content"]) + 4 for message in call.messages) + 3
        cost = prompt + call.max_tokens
        if cost > self.left:
            self.refused += 1
            limits = Limits(limit_tokens=TPM, remaining_tokens=int(self.left), reset_tokens=60.0)
            raise mb.RateLimited("slow down", status=429, retry_after=1.0, limits=limits)
        self.level -= cost
        charge = [now, cost]
        self.window.append(charge)
        self.charged += cost
        left = self.left
        completion = await super().send(call, on_text)
        charge[1] = prompt + 20
        self.charged += charge[1] - cost
        self.used += charge[1] if not self.refills else cost
        limits = Limits(limit_tokens=TPM, remaining_tokens=int(left), reset_tokens=(TPM - left) * 60 / TPM)
        return Completion(completion.finish_reason, usage=Usage(prompt, 20), limits=limits)


@pytest.mark.parametrize(
    ("refills", "charge", "least"),
    [
        (False, "used", 0.95),
        # What the headers show is what was given back before the call, so the latest few calls' is always missing.
        (False, "reserved", 0.85),
        (True, "reserved", 0.95),
    ],
)
async def test_endpoints_that_give_back_or_refill(refills, charge, least):
    endpoint = Enforcer(refills=refills)
    policy = mb.FlushPolicy(max_batch_size=1, max_concurrent_batches=256)
    limit = mb.RateLimit(tpm=TPM, charge=charge)
    load = Load(**SINGLE, max_tokens=100)
    async with mb.Microbatcher(endpoint, policy=policy, rate_limit=limit, tokens="bytes") as batcher:
        async for result in batcher.map(load.until(60 * MINUTES)):
            result.unwrap()
    minutes = asyncio.get_running_loop().time() / 60
    assert endpoint.refused == 0
    assert endpoint.used / minutes / TPM >= least
