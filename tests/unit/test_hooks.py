"""Whoever listens is told of every flush, call and end of a request; a listener that fails harms nobody."""

import asyncio
import contextvars
import logging

import pytest
from helpers import ask, batcher_for

import microbatch as mb
from microbatch.testing import ScriptedTransport

WHO = contextvars.ContextVar("who", default="nobody")

PRICES = {"m": mb.Price(input=2.0, output=8.0)}


class Listener:
    """Keeps what it is told, and who each caller was."""

    def __init__(self):
        self.flushed, self.called, self.settled = [], [], []

    def on_submit(self):
        return WHO.get()

    def on_flush(self, event):
        self.flushed.append(event)

    def on_call(self, event):
        self.called.append(event)

    def on_settle(self, event):
        self.settled.append(event)


async def submit(batcher, text, who=None, **options):
    WHO.set(who or text)
    return await batcher.submit(ask(text), **options)


async def submit_all(batcher, texts, **options):
    tasks = [asyncio.ensure_future(submit(batcher, text, **options)) for text in texts]
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_batch_is_told_of_once_and_each_of_its_requests_once():
    listener = Listener()
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, hooks=[listener], prices=PRICES, idle="wait", max_wait=0.5) as batcher:
        replies = await submit_all(batcher, "abc", model="m", temperature=1, max_tokens=9)
    (flush,), (call,) = listener.flushed, listener.called
    assert flush == mb.Flushed(reason="timeout", size=3, model="m", priority="normal", waited=0.5)
    assert (call.route, call.size, call.model, call.duration, call.attempts) == ("batch", 3, "m", 1.0, 1)
    assert (call.first_text, call.streamed, call.temperature, call.finish_reason) == (1.0, True, 1, "stop")
    assert call.origins == ("a", "b", "c")
    assert call.usage.prompt_tokens > 0
    assert call.cost_usd == pytest.approx(batcher.stats().cost_usd)
    assert [event.origin for event in listener.settled] == ["a", "b", "c"]
    for event, reply in zip(listener.settled, replies, strict=True):
        assert (event.route, event.batch_size, event.waited, event.latency) == ("batch", 3, 0.5, 1.5)
        assert (event.error, event.model) == (None, reply.model)


async def test_singles_retries_and_errors_are_told():
    listener = Listener()
    down = mb.ServerError("down", status=503, retry_after=0.0)
    transport = ScriptedTransport(down, "fine", mb.AuthFailed("no", status=403))
    async with batcher_for(transport, hooks=[listener], prices=PRICES) as batcher:
        await submit_all(batcher, "a")
        await submit_all(batcher, "b", priority="high")
    assert [(event.reason, event.size, event.priority) for event in listener.flushed] == [
        ("idle", 1, "normal"),
        ("high", 1, "high"),
    ]
    assert [(event.attempts, event.route, type(event.error)) for event in listener.called] == [
        (2, "single", type(None)),
        (1, "single", mb.AuthFailed),
    ]
    assert [(event.route, type(event.error), event.origin) for event in listener.settled] == [
        ("single", type(None), "a"),
        (None, mb.AuthFailed, "b"),
    ]


async def test_who_leaves_is_told_of_too_and_so_is_a_deadline():
    listener = Listener()
    async with batcher_for(ScriptedTransport(delay=9.0), hooks=[listener], prices=PRICES) as batcher:
        leaver = asyncio.ensure_future(submit(batcher, "leaver"))
        late = asyncio.ensure_future(submit(batcher, "late", timeout=2.0))
        await asyncio.sleep(1.0)
        leaver.cancel()
        await asyncio.gather(leaver, late, return_exceptions=True)
    assert [(event.origin, event.route, type(event.error), event.latency) for event in listener.settled] == [
        ("leaver", None, type(None), 1.0),
        ("late", None, mb.DeadlineExceeded, 2.0),
    ]


async def test_every_caller_of_a_flight_is_told_of_and_its_call_names_them_all():
    listener = Listener()
    async with batcher_for(ScriptedTransport(delay=1.0), hooks=[listener], prices=PRICES) as batcher:
        tasks = [asyncio.ensure_future(submit(batcher, "same", who, temperature=0)) for who in ("x", "y", "z")]
        await asyncio.sleep(0.5)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    (call,) = listener.called
    assert set(call.origins) == {"y", "z"}
    assert sorted((event.origin, event.route) for event in listener.settled[1:]) == [("y", "shared"), ("z", "shared")]
    assert (listener.settled[0].origin, listener.settled[0].route) == ("x", None)


async def test_hits_are_told():
    listener = Listener()
    async with batcher_for(ScriptedTransport(), hooks=[listener], prices=PRICES, cache=mb.MemoryCache()) as batcher:
        await submit_all(batcher, "a")
        await submit(batcher, "a", "again")
    event = listener.settled[-1]
    assert (event.route, event.origin, event.usage, event.cost_usd) == ("cache", "again", mb.Usage(), 0.0)
    assert len(listener.called) == 1


async def test_map_and_fallback_are_told():
    listener = Listener()
    transport = ScriptedTransport(lambda call: call.reply([(call.items[0][0], "A")]))
    async with batcher_for(transport, hooks=[listener], prices=PRICES) as batcher:
        WHO.set("bulk")
        results = [result.unwrap().output async for result in batcher.map([ask("a"), ask("b"), ask("c")], ordered=True)]
    assert results == ["A", "B", "C"]
    assert listener.called[0].route == "batch"
    assert {event.route for event in listener.called[1:]} == {"fallback"}
    assert {event.origin for event in listener.settled} == {"bulk"}
    assert len(listener.settled) == 3


class Failing:
    def on_submit(self):
        raise ValueError("submit")

    def on_flush(self, event):
        raise ValueError("flush")

    def on_call(self, event):
        raise BaseException("call")  # noqa: TRY002 as a Rust panic is

    def on_settle(self, event):
        raise ValueError("settle")


@pytest.mark.promise(of="callbacks")
async def test_a_hook_that_raises_harms_neither_requests_nor_other_hooks(caplog):
    listener = Listener()
    with caplog.at_level(logging.WARNING, logger="microbatch"):
        async with batcher_for(ScriptedTransport(), hooks=[Failing(), listener, Failing()], prices=PRICES) as batcher:
            replies = await submit_all(batcher, "abc")
            assert batcher.stats().queued == 0
    assert [reply.output for reply in replies] == ["A", "B", "C"]
    assert [event.origin for event in listener.settled] == ["a", "b", "c"]
    assert len(listener.flushed) == len(listener.called) == 1
    assert {record.message.split(" raised ")[0] for record in caplog.records} == {"a hook"}


async def test_a_hook_may_have_any_of_the_methods_or_none():
    class Settles:
        def __init__(self):
            self.seen = []

        def on_settle(self, event):
            self.seen.append(event.origin)

    one = Settles()
    async with batcher_for(ScriptedTransport(), hooks=[one, object()], prices=PRICES) as batcher:
        await submit_all(batcher, "ab")
    assert one.seen == [None, None]


class Told:
    def __init__(self):
        self.calls = []

    def on_call(self, event):
        self.calls.append(event)


CUT = mb.Completion(None, usage=mb.Usage(100, 10, 40), model="m")


@pytest.mark.parametrize(
    "script",
    [
        [CUT, ("HI", mb.Completion("stop", usage=mb.Usage(100, 5), model="m"))],
        [CUT, CUT, ("HI", mb.Completion("stop", usage=mb.Usage(100, 5), model="dearer"))],
        [CUT, ("HI", mb.Completion("stop"))],
        [CUT, mb.BadRequest("no", status=400)],
        [CUT] * 4,
        [("HI", mb.Completion("stop", usage=mb.Usage(100, 5), model="free"))],
    ],
    ids=["repeated", "by another model", "then unreported", "then refused", "always cut", "unpriced"],
)
@pytest.mark.parametrize("items", [1, 2])
async def test_hooks_are_told_of_every_token_that_stats_count(script, items):
    told, transport = Told(), ScriptedTransport(*script)
    prices = {"m": mb.Price(2.0, 8.0), "dearer": mb.Price(20.0, 80.0)}
    async with batcher_for(transport, hooks=[told], prices=prices, idle="wait", max_wait=0.1) as batcher:
        asking = (batcher.submit(ask(text), model="m") for text in "ab"[:items])
        await asyncio.gather(*asking, return_exceptions=True)
        stats = batcher.stats()
    reported = [event.usage for event in told.calls if event.usage is not None]
    assert sum(usage.prompt_tokens for usage in reported) == stats.prompt_tokens
    assert sum(usage.completion_tokens for usage in reported) == stats.completion_tokens
    assert sum(usage.cached_tokens for usage in reported) == stats.cached_tokens
    assert sum(event.attempts for event in told.calls) == stats.upstream_calls
    if stats.cost_usd is not None:
        assert sum(event.cost_usd or 0.0 for event in told.calls) == pytest.approx(stats.cost_usd)


async def test_events_name_the_tenant_and_the_model_that_was_asked_for():
    listener, answer = Listener(), mb.Completion("stop", usage=mb.Usage(70, 5), model="m-2026-01-01")
    transport = ScriptedTransport(("A", answer))
    transport.model = "default"
    async with batcher_for(transport, hooks=[listener], cache=mb.MemoryCache()) as batcher:
        await submit(batcher, "a", tenant="t")
        await submit(batcher, "a", tenant="t")
        await submit(batcher, "b", model="m")
    assert [(event.route, event.tenant, event.requested_model) for event in listener.settled] == [
        ("single", "t", "default"),
        ("cache", "t", "default"),
        ("single", None, "m"),
    ]
    assert [(event.tenant, event.requested_model) for event in listener.called] == [("t", "default"), (None, "m")]


async def test_what_the_events_say_was_saved_adds_up():
    listener = Listener()
    steps = [lambda call: call.reply((name, "A") for name, _ in call.items[1:])]
    async with batcher_for(
        ScriptedTransport(*steps), hooks=[listener], prices=PRICES, cache=mb.MemoryCache(), idle="wait", max_wait=0.5
    ) as batcher:
        await submit_all(batcher, "abcb", model="m")
        await submit_all(batcher, "ad", model="m")
        stats = batcher.stats()
    assert (stats.cache_hits, stats.shared, stats.fallback_calls) == (1, 1, 1)
    events = [*listener.called, *(event for event in listener.settled if event.route == "cache")]
    assert sum(event.unbatched_cost_usd for event in events) == pytest.approx(stats.unbatched_cost_usd)
    assert sum(event.cost_usd for event in events) == pytest.approx(stats.cost_usd)


async def test_without_a_price_events_do_not_say_what_was_saved():
    listener = Listener()
    async with batcher_for(ScriptedTransport(), hooks=[listener], prices=PRICES, idle="wait", max_wait=0.5) as batcher:
        await submit_all(batcher, "abc", model="without a price")
    assert [event.unbatched_cost_usd for event in (*listener.called, *listener.settled)] == [None] * 4
