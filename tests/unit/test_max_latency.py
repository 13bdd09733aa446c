"""`FlushPolicy(max_latency=)`: batches are as large as the time of their replies allows, on any endpoint."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from helpers import ask, now
from hypothesis import given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.batching.latency import ReplyTimes, first_size
from microbatch.spool.payload import Payload
from microbatch.spool.provider.input_file import Composer
from microbatch.spool.records import Delivery, Name
from microbatch.testing import Latency, ScriptedTransport, SimulatedModel, SimulatedTransport
from microbatch.transports.chat_wire import BatchWire

USUAL = Latency(first_token=0.5, tokens_per_second=80)
SLOW = Latency(first_token=0.2, tokens_per_second=30)
LATE = Latency(first_token=2, tokens_per_second=200)
FROM = 100
"""Requests after which the limit holds."""


def spoken(least=5, most=5):
    """Return an answer function: the same words for the same text, *least* to *most* tokens."""

    def answer(text, _schema):
        draw = random.Random(text)
        return " ".join(draw.choices(["yes", "house", "river", "good", "word"], k=draw.randint(least, most)))

    return answer


class Delayed(SimulatedTransport):
    """Delays each call by `extra()` seconds; *held* gives a reply's pieces all at its end, as a buffering proxy does."""

    def __init__(self, model, *, extra=lambda: 0.0, held=False):
        super().__init__(model)
        self.extra, self.held = extra, held

    async def send(self, call, on_text):
        await asyncio.sleep(self.extra())
        if not self.held:
            return await super().send(call, on_text)
        pieces = []
        completion = await super().send(call, pieces.append)
        for piece in pieces:
            on_text(piece)
        return completion


class Calls:
    """Keeps the sizes of what leaves, in order, and size and duration of each ended call."""

    def __init__(self):
        self.left = []
        self.calls = []

    def on_flush(self, flushed):
        self.left.append(flushed.size)

    def on_call(self, called):
        self.calls.append((called.size, called.duration))


def late(seconds):
    """Return the 95th percentile of *seconds*."""
    return sorted(seconds)[len(seconds) * 95 // 100]


async def traffic(transport, count, rate, *, bulk=False, hooks=None, each=lambda number: None, **options):
    """Ask *count* questions, *rate* a second, or all as *bulk* work; return seconds from leaving to the answer, and the stats."""
    options = {"max_batch_size": 32, **options}
    own = {name: options.pop(name) for name in ("fallback", "retry") if name in options}
    draw, taken = random.Random(1), {}
    async with mb.Microbatcher(
        transport, policy=mb.FlushPolicy(**options), hooks=hooks or [], tokens="bytes", **own
    ) as batcher:

        async def one(number):
            reply = await batcher.submit(ask(f"item {number}"))
            taken[number] = reply.latency - reply.waited

        if bulk:
            requests = [mb.Request(messages=ask(f"item {number}")) for number in range(count)]
            async for result in batcher.map(requests):
                taken[len(taken)] = result.reply.latency - result.reply.waited
        else:
            asked = []
            for number in range(count):
                each(number)
                asked.append(asyncio.ensure_future(one(number)))
                await asyncio.sleep(draw.expovariate(rate))
            await asyncio.gather(*asked)
        return [taken[number] for number in range(count)], batcher.stats()


@pytest.mark.parametrize(
    ("latency", "limit", "fixed", "options"),
    [
        (USUAL, 2.0, (6, 7, 8), {}),
        (USUAL, 2.0, (6, 7, 8), {"bulk": True}),
        (USUAL, 2.0, (6, 7, 8), {"fallback": mb.FallbackPolicy(resolve="verified"), "count": 2_400}),
        pytest.param(USUAL, 2.0, (6, 7, 8), {"words": (2, 12)}, marks=pytest.mark.slow),
        pytest.param(USUAL, 2.0, (6, 7, 8), {"held": True, "count": 2_400}, marks=pytest.mark.slow),
        pytest.param(USUAL, 2.0, (6, 7, 8), {"max_concurrent_batches": 4}, marks=pytest.mark.slow),
        (SLOW, 2.0, (2, 3, 4), {}),
        pytest.param(SLOW, 2.0, (2, 3, 4), {"bulk": True}, marks=pytest.mark.slow),
        (LATE, 3.0, (11, 12, 13, 14), {"bulk": True}),
        pytest.param(LATE, 3.0, (11, 12, 13, 14), {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
async def test_the_limit_is_kept_with_few_calls(latency, limit, fixed, options):
    """At most a fifth more than by the best fixed size that keeps it, what is asked before anything is known included."""
    options = dict(options)
    words, held, count = options.pop("words", (5, 5)), options.pop("held", False), options.pop("count", 1_200)

    async def run(**settings):
        transport = Delayed(SimulatedModel(answer=spoken(*words), latency=latency), held=held)
        taken, stats = await traffic(transport, count, 100, **options, **settings)
        return late(taken[FROM:]), stats.upstream_calls

    by_size = [await run(max_batch_size=size) for size in fixed]
    best = min(calls for seconds, calls in by_size if seconds <= limit)
    seconds, calls = await run(max_latency=limit)
    assert seconds <= limit
    assert calls <= 1.2 * best


async def test_a_slower_endpoint_gets_smaller_batches_and_a_faster_one_larger_again():
    model, hook = SimulatedModel(answer=spoken(), latency=USUAL), Calls()
    marks = {}

    def change(number):
        if number in (800, 1_600):
            model.latency = SLOW if number == 800 else USUAL
            marks[number] = len(hook.calls)

    await traffic(SimulatedTransport(model), 2_600, 50, each=change, hooks=[hook], max_latency=2.0)
    before, slow, after = (hook.calls[start : start + 40] for start in (marks[800] - 40, marks[1_600] - 40, -60))
    assert max(size for size, _ in before) == max(size for size, _ in after) == 7
    assert max(size for size, _ in slow) == 3
    assert late([seconds for _, seconds in slow]) <= 2.0


async def test_requests_go_alone_while_not_even_two_are_in_time_and_try_again():
    """One pair for 40 single calls, so that 95 % are in time all the same; as soon as a pair is, batches grow."""
    model, hook = SimulatedModel(answer=spoken(), latency=Latency(first_token=0.5, tokens_per_second=10)), Calls()
    ended = []

    def change(number):
        if number == 700:
            model.latency = USUAL
            ended.append(len(hook.left))

    taken, stats = await traffic(SimulatedTransport(model), 1_100, 20, each=change, hooks=[hook], max_latency=2.0)
    alone = hook.left[250 : ended[0]]
    pairs = [position for position, size in enumerate(alone) if size > 1]
    assert set(alone) == {1, 2}
    assert all(40 < after - before < 130 for before, after in itertools.pairwise(pairs))
    assert len(pairs) >= 3
    assert late(taken[250:700]) <= 2.0
    assert stats.singles_by_reason["latency"] > 500
    assert max(size for size, _ in hook.calls[-20:]) > 3


@pytest.mark.parametrize("merge", ["always", "when-cheaper"])
async def test_bulk_work_that_goes_alone_tries_again(merge):
    model = SimulatedModel(answer=spoken(), latency=Latency(first_token=3, tokens_per_second=1_000))
    transport = SimulatedTransport(model)
    policy = mb.FlushPolicy(max_latency=2.0, max_concurrent_batches=1, merge=merge)
    system = "Say it in five words, as you would to a friend. " * 40
    async with mb.Microbatcher(transport, policy=policy, tokens="bytes") as batcher:
        requests = [mb.Request(messages=ask(f"item {number}", system)) for number in range(150)]
        async for _ in batcher.map(requests):
            pass
        stats = batcher.stats()
        assert stats.singles_by_reason["latency"] > 100
        model.latency = Latency(first_token=0.3, tokens_per_second=1_000)
        async for _ in batcher.map(requests * 2):
            pass
        assert batcher.stats().upstream_calls - stats.upstream_calls < 120


async def test_waiting_for_a_permit_does_not_count():
    """A batch leaves with its permit; until then it fills."""
    hook = Calls()
    transport = SimulatedTransport(SimulatedModel(answer=spoken(), latency=USUAL))
    limited = mb.Microbatcher(
        transport,
        policy=mb.FlushPolicy(max_batch_size=32, max_latency=2.0),
        rate_limit=mb.RateLimit(rpm=60),
        hooks=[hook],
        tokens="bytes",
    )
    async with limited as batcher:
        start = now()
        await asyncio.gather(*(batcher.submit(ask(f"item {number}")) for number in range(600)))
        assert now() - start > 20
    assert [size for size, _ in hook.calls[-20:-2]] == [7] * 18


async def test_waiting_between_attempts_does_not_count():
    """Every other call is refused at first."""
    refused, hook = {}, Calls()

    class Busy(SimulatedTransport):
        async def send(self, call, on_text):
            if id(call) not in refused:
                refused[id(call)] = call
                if len(refused) % 2:
                    raise mb.ServerError("busy", status=503, retry_after=4)
            return await super().send(call, on_text)

    transport = Busy(SimulatedModel(answer=spoken(), latency=USUAL))
    await traffic(transport, 1_000, 30, hooks=[hook], max_latency=2.0, retry=mb.RetryPolicy(budget=1.0))
    assert max(size for size, _ in hook.calls[-30:]) == 7


async def test_single_slow_calls_change_little():
    """One in fifty takes three seconds longer: about as many answers are late, and no size would change that."""
    calls, hook = itertools.count(1), Calls()
    transport = Delayed(SimulatedModel(answer=spoken(), latency=USUAL), extra=lambda: 0.0 if next(calls) % 50 else 3.0)
    taken, stats = await traffic(transport, 1_600, 50, hooks=[hook], max_latency=2.0, idle="wait", max_wait=0.2)
    assert late(taken[FROM:]) <= 2.0
    assert stats.upstream_calls < 1_600 / 7 * 1.2
    assert "latency" not in stats.singles_by_reason


async def test_answers_that_no_caller_waits_for_any_more_teach_too():
    """The callers leave before any reply is there, so that none of them shows its time."""
    hook = Calls()
    transport = Delayed(SimulatedModel(answer=spoken(), latency=USUAL), extra=lambda: 4.0)
    policy = mb.FlushPolicy(max_latency=2.0, idle="wait", max_concurrent_batches=2)
    async with mb.Microbatcher(transport, policy=policy, hooks=[hook], tokens="bytes") as batcher:
        for start in range(0, 240, 8):
            asked = (batcher.submit(ask(f"item {start + number}"), timeout=3.0) for number in range(8))
            ended = await asyncio.gather(*asked, return_exceptions=True)
            assert {type(each) for each in ended} <= {mb.DeadlineExceeded, mb.TransportTimeout}
        assert batcher.stats().singles_by_reason["latency"] > 40


async def test_a_lane_that_knows_nothing_learns_while_its_first_reply_arrives():
    """An answer a second: after the second answer, ten seconds allow at most ten, though the first batch was larger."""
    left = []

    class Spoken(ScriptedTransport):
        async def send(self, call, on_text):
            pieces = []
            completion = await super().send(call, pieces.append)
            elements = "".join(pieces).replace("},", "},\0").split("\0")
            left.append(len(elements))
            for element in elements:
                await asyncio.sleep(1.0)
                on_text(element)
            return completion

    transport = Spoken(answer=str.upper)
    async with mb.Microbatcher(
        transport, policy=mb.FlushPolicy(max_latency=10, idle="wait"), tokens="bytes"
    ) as batcher:
        asked = [asyncio.ensure_future(batcher.submit(ask(f"item {number}"))) for number in range(16)]
        await asyncio.sleep(3.5)
        asked += [asyncio.ensure_future(batcher.submit(ask(f"item {number}"))) for number in range(16, 40)]
        await asyncio.gather(*asked)
    assert left[0] == 16
    assert max(left[1:]) <= 10


async def test_lanes_learn_apart_and_nothing_is_learned_without_a_limit():
    slow = "Write slowly."

    async def step(call):
        await asyncio.sleep(5.0 if slow in str(call.call.messages) else 0.1)
        return call.reply(call.items) if call.combined else call.items[0][1]

    async def sizes(**options):
        transport = ScriptedTransport(*[step] * 400)
        async with mb.Microbatcher(transport, policy=mb.FlushPolicy(**options), tokens="bytes") as batcher:
            for _ in range(8):
                asked = [
                    batcher.submit(ask(f"{number}", system)) for number in range(32) for system in ("Shout.", slow)
                ]
                await asyncio.gather(*asked)
        return [
            max(len(call.items) for call in transport.calls[-40:] if (slow in str(call.call.messages)) is is_slow)
            for is_slow in (False, True)
        ]

    assert await sizes() == [16, 16]
    fast, slowly = await sizes(max_latency=2.0)
    assert fast == 16
    assert slowly <= 2


# --- the rule by itself


def settled(limit, once, each, *, streamed, noise=lambda: 1.0, calls=400, seen=1.0):
    """Return the sizes that a lane uses in turn on an endpoint whose replies take *once* and *each* for each answer.

    A stream shows the *seen* part of the time of an answer.
    """
    times, sizes = ReplyTimes(limit, first_size(limit, None)), []
    for _ in range(calls):
        size = times.most
        sizes.append(size)
        if size == 1:
            times.left_alone()
            continue
        times.left(size)
        seconds = (once + each * size) * noise()
        times.record(size, seconds, each * seen if streamed else None)
    return sizes


@given(
    once=st.floats(0, 4),
    each=st.floats(0.005, 2),
    limit=st.floats(0.5, 6),
    streamed=st.booleans(),
)
def test_any_endpoint_gets_the_largest_size_in_time(once, each, limit, streamed):
    sizes = settled(limit, once, each, streamed=streamed)[-80:]
    best = int(((1 if streamed else 0.98) * limit - once) / each + 1e-6)
    if best < 2:
        assert sizes.count(1) >= 76
    else:
        assert max(sizes) <= max(int(limit / each), best + 1)
        late_calls = sum(once + each * size > limit * (1 + 1e-9) for size in sizes)
        assert late_calls <= 4
        assert sum(sizes) / len(sizes) >= best / 1.2 - 0.2


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_times_that_vary_keep_the_limit_too(seed, streamed):
    draw = random.Random(seed)
    sizes = settled(3.0, 0.6, 0.2, streamed=streamed, noise=lambda: draw.lognormvariate(0, 0.15), calls=600)[100:]
    late_answers = total = 0
    for size in sizes:
        noise = draw.lognormvariate(0, 0.15)
        in_time = [(0.6 + 0.2 * (place + 1 if streamed else size)) * noise <= 3.0 for place in range(size)]
        late_answers += size - sum(in_time)
        total += size
    assert late_answers / total <= 0.06
    assert sum(sizes) / len(sizes) >= 6


def test_whole_durations_alone_show_their_parts_by_a_trial():
    """Four in 1.8 s may be 0.45 s for each, so that five would be late; in fact they are not."""
    sizes = settled(2.0, 1.4, 0.1, streamed=False)
    assert sizes[0] == 4
    assert max(sizes) <= 6
    assert sizes.count(6) <= len(sizes) / 40
    assert set(sizes[-30:]) <= {5, 6}


def test_streams_that_come_in_large_pieces_do_not_look_like_a_late_first_token():
    sizes = settled(2.0, 0.5, 0.2, streamed=True, seen=0.1)
    assert 1 not in sizes
    assert max(sizes[100:]) == 8
    assert sizes[100:].count(8) <= len(sizes[100:]) / 40 + 1
    assert min(sizes[100:]) == 7


def test_a_call_of_no_time_at_all_is_no_error():
    times = ReplyTimes(1.0, 4)
    for _ in range(50):
        times.record(times.most, 0.0)
    assert times.most >= 64


# --- where else the setting counts


async def test_batches_of_a_provider_are_not_limited():
    """They take up to a day."""
    payloads = [Payload.of(ask(f"text {number}"), model="m") for number in range(32)]
    taken = [Delivery(each.item(Name(None, str(number))), 1, "lease", 0.0) for number, each in enumerate(payloads)]
    (draft,), _ = await Composer(BatchWire(None, where="x"), mb.FlushPolicy(max_latency=0.1)).drafts(taken)
    assert len(draft.lines) == 2


@pytest.mark.parametrize("limit", [-1, "2", float("nan")])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(mb.ConfigError):
        mb.FlushPolicy(max_latency=limit)
