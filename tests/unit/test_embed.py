"""`embed` and `embed_many`: when texts leave, what their callers get, and what it costs."""

import asyncio
from array import array

import pytest
from helpers import ask, batcher_for, each, now
from vectors import LENGTH, VectorTransport, is_right, tokens_of, vector_of

import microbatch as mb
from microbatch.testing import ScriptedTransport


def texts(count, size=0):
    return [f"text {number} ".ljust(size, "x") for number in range(count)]


async def embed_all(batcher, wanted, **options):
    return await asyncio.gather(*(batcher.embed(text, **options) for text in wanted))


# --- when they leave


async def test_concurrent_texts_leave_as_one_call_and_each_caller_gets_its_own_vector():
    transport = VectorTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        found = await embed_all(batcher, texts(1_000))
    assert transport.sizes == [1_000]
    assert all(is_right(*pair) for pair in zip(found, texts(1_000), strict=True))
    assert {each.batch_size for each in found} == {1_000}
    assert {each.model for each in found} == {"embedder-1"}
    assert {type(each.vector) for each in found} == {array}
    assert {each.vector.typecode for each in found} == {"f"}


async def test_a_text_on_an_idle_lane_waits_for_no_others():
    async with batcher_for(VectorTransport(), max_wait=5.0) as batcher:
        await batcher.embed("now")
        assert now() == 0.0
    assert batcher.stats().singles_by_reason == {"idle": 1}


async def test_texts_that_come_while_a_call_is_under_way_leave_together_after_max_wait():
    transport = VectorTransport(delay=10.0)
    async with batcher_for(transport, max_wait=0.5) as batcher:
        first = asyncio.ensure_future(batcher.embed("first"))
        await asyncio.sleep(1.0)
        second = asyncio.ensure_future(batcher.embed("second"))
        await asyncio.sleep(0.25)
        await asyncio.gather(batcher.embed("third"), second)
        assert now() == 11.5
        await first
    assert transport.sizes == [1, 2]
    assert batcher.stats().batches_by_reason == {"timeout": 1}


async def test_a_list_holds_at_most_2048_texts_whatever_the_size_of_chat_batches_is():
    transport = VectorTransport(delay=1.0)
    async with batcher_for(transport, max_batch_size=2, max_batch_tokens=10, max_output_tokens=10) as batcher:
        await embed_all(batcher, texts(5_000))
    assert transport.sizes == [2_048, 2_048, 904]
    assert batcher.stats().batches_by_reason == {"size": 2, "timeout": 1}


async def test_a_list_holds_at_most_300_000_tokens():
    transport = VectorTransport(delay=1.0)
    async with batcher_for(transport) as batcher:  # whose tokens are bytes
        await embed_all(batcher, texts(7, 100_000))
        assert transport.sizes == [3, 3, 1]
        alone = await batcher.embed("x" * 400_000)
    assert is_right(alone, "x" * 400_000)
    assert batcher.stats().batches_by_reason["tokens"] == 2


async def test_texts_are_counted_exactly_only_where_their_bytes_do_not_fit():
    counted = []

    def count(text):
        counted.append(text)
        return len(text) // 10

    transport = VectorTransport(delay=1.0)
    batcher = mb.Microbatcher(transport, tokens="bytes")
    batcher._parts.given.estimates._count = count
    async with batcher:
        await embed_all(batcher, texts(25, 10_000))
        assert not counted
        await embed_all(batcher, texts(40, 10_000))
    assert transport.sizes == [25, 40]
    assert 0 < len(counted) < 40
    assert set(counted) <= set(texts(40, 10_000))  # the texts themselves


@each(
    "options",
    [
        {"model": "other"},
        {"dimensions": 3},
        {"params": {"user": "u"}},
        {"headers": {"X-Team": "t"}},
        {"headers": {"Authorization": "Bearer k"}},
        {"tenant": "t"},
        {"priority": "high"},
        {"priority": "low"},
    ],
)
async def test_texts_whose_options_differ_never_share_a_call(options):
    transport = VectorTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        others = [f"other {text}" for text in texts(5)]  # equal ones share a vector at any priority
        found, other = await asyncio.gather(embed_all(batcher, texts(5)), embed_all(batcher, others, **options))
    assert transport.sizes == [5, 5]
    assert all(is_right(*pair) for pair in zip(found, texts(5), strict=True))
    length = options.get("dimensions", LENGTH)
    assert all(is_right(*pair, length) for pair in zip(other, others, strict=True))
    calls = {call.model: call for call in transport.calls}
    if "model" in options:
        assert calls.keys() == {"embedder", "other"}


async def test_the_options_arrive_as_given():
    transport = VectorTransport()
    async with batcher_for(transport) as batcher:
        await batcher.embed(
            "a \u2028 \U0001f600\n", model="m", dimensions=2, params={"user": "u"}, headers={"X-A": "b"}, timeout=5.0
        )
    (call,) = transport.calls
    assert call.inputs == ["a \u2028 \U0001f600\n"]
    assert (call.model, call.dimensions, call.params, call.headers) == ("m", 2, {"user": "u"}, {"x-a": "b"})
    assert call.timeout == 5.0


async def test_a_high_priority_text_waits_for_no_others():
    transport = VectorTransport(delay=10.0)
    async with batcher_for(transport, max_wait=5.0) as batcher:
        first = asyncio.ensure_future(batcher.embed("first", priority="high"))
        await asyncio.sleep(1.0)
        await batcher.embed("second", priority="high")
        assert now() == 11.0
        await first


async def test_chat_and_texts_do_not_disturb_each_other():
    class Both(ScriptedTransport):
        embedding_model = "embedder"
        embed = VectorTransport.embed

        def __init__(self):
            super().__init__()
            self.vectors = VectorTransport()
            self.embed = self.vectors.embed

    async with batcher_for(transport := Both()) as batcher:
        for _ in range(3):
            reply, found = await asyncio.gather(batcher.submit(ask("hello")), batcher.embed("hello"))
            assert reply.output == "HELLO"
            assert is_right(found, "hello")
        assert len(batcher._engine.lanes._by_key) == 2  # both stay at hand
    assert transport.vectors.sizes == [1, 1, 1]


# --- any number


async def test_many_texts_come_in_order_in_full_lists():
    transport = VectorTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        found = await batcher.embed_many(texts(5_000))
    assert all(is_right(*pair) for pair in zip(found, texts(5_000), strict=True))
    assert sorted(transport.sizes) == [904, 2_048, 2_048]


async def test_the_last_texts_do_not_wait_for_the_lists_before_them():
    async with batcher_for(VectorTransport(delay=10.0), max_wait=50.0) as batcher:
        await batcher.embed_many(texts(2_500))
        assert now() == 10.0


async def test_of_an_iterator_no_more_is_read_than_the_window_holds():
    read = 0

    def source():
        nonlocal read
        for text in texts(30_000):
            read += 1
            yield text

    transport = VectorTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        task = asyncio.ensure_future(batcher.embed_many(source()))
        await asyncio.sleep(0.5)
        assert read == 8_192
        assert batcher.stats().queued == 8_192
        found = await task
    assert len(found) == 30_000
    assert all(is_right(*pair) for pair in zip(found, texts(30_000), strict=True))


@each("places", [1, 7, 300])
async def test_many_texts_get_through_a_small_queue(places):
    transport = VectorTransport(delay=0.01)
    async with batcher_for(transport, max_queued=places, max_wait=100.0) as batcher:
        found = await batcher.embed_many(texts(700))
        assert now() < 10.0  # what keeps the places waits for nothing
    assert all(is_right(*pair) for pair in zip(found, texts(700), strict=True))


async def test_more_equal_texts_than_the_window_holds_are_one_text():
    transport = VectorTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        found = await batcher.embed_many(["same"] * 20_000)
    assert len(found) == 20_000
    assert all(is_right(one, "same") for one in found)
    assert len(transport.calls) <= 3
    assert sum(one.usage.prompt_tokens for one in found) == transport.tokens


async def test_many_texts_end_with_an_error_when_the_batcher_closes_in_the_middle():
    transport = VectorTransport(delay=10.0)

    def source():
        for number, text in enumerate(texts(30_000)):
            yield text
            if number == 5_000:
                closing.append(asyncio.ensure_future(batcher.aclose()))

    for grace in (30.0, 0.0):
        closing = []
        begun = now()
        batcher = await batcher_for(transport).open()
        task = asyncio.ensure_future(batcher.embed_many(source()))
        found = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(found[0], mb.BatcherClosed | mb.ShutDown)
        await batcher.aclose(grace)
        assert now() - begun <= 20.0  # it does not wait for what was queued too late
        stats = batcher.stats()
        assert stats.queued == 0
        assert stats.items == stats.answered + stats.failed + stats.cancelled


async def test_none_is_no_work():
    async with batcher_for(transport := VectorTransport()) as batcher:
        assert await batcher.embed_many([]) == []
        assert await batcher.embed_many(iter(())) == []
    assert transport.calls == []


async def test_the_error_of_the_earliest_text_is_raised_when_all_that_were_sent_have_ended():
    transport = VectorTransport(delay=1.0, refused=["text 5 ", "text 3 "])
    async with batcher_for(transport) as batcher:
        with pytest.raises(mb.BadRequest) as caught:
            await batcher.embed_many(texts(9))
        assert batcher.stats().queued == 0
    assert caught.value.attempts > 1
    stats = batcher.stats()
    assert (stats.answered, stats.failed) == (7, 2)
    assert stats.unclaimed.prompt_tokens == stats.prompt_tokens == transport.tokens > 0  # no caller has a vector


async def test_the_earliest_error_is_raised_also_if_more_texts_were_waiting_than_are_pending_at_a_time():
    def refuse(_, inputs, pairs):
        if len(inputs) == 1 and inputs[0] in ("text 3 ", "text 8000 "):
            raise mb.BadRequest(inputs[0], status=400)
        if {"text 3 ", "text 8000 "} & set(inputs):
            raise mb.BadRequest("one of many", status=400)
        return pairs

    async with batcher_for(VectorTransport(refuse, delay=1.0)) as batcher:
        for source in (texts(20_000), iter(texts(20_000))):
            with pytest.raises(mb.BadRequest, match="text 3 "):
                await batcher.embed_many(source, use_cache=False)


async def test_a_long_list_is_checked_in_slices_between_which_others_have_their_turn():
    turns = []

    async def count():
        while True:
            turns.append(len(transport.calls))
            await asyncio.sleep(0)

    transport = VectorTransport()
    async with batcher_for(transport) as batcher:
        counting = asyncio.ensure_future(count())
        with pytest.raises(mb.ConfigError, match=r"texts\[20000\]"):
            await batcher.embed_many([*texts(20_000), 1])
        counting.cancel()
    assert len(turns) >= 20_000 // 512
    assert not transport.calls


async def test_after_an_error_no_more_is_read():
    read = 0

    def source():
        nonlocal read
        for text in ["bad", *texts(50_000)]:
            read += 1
            yield text

    async with batcher_for(VectorTransport(delay=1.0, refused=["bad"])) as batcher:
        with pytest.raises(mb.BadRequest):
            await batcher.embed_many(source())
    assert read < 20_000


async def test_an_error_of_the_source_is_raised_and_nothing_stays_behind():
    def source():
        yield from texts(10)
        raise KeyError("mine")

    async with batcher_for(VectorTransport()) as batcher:
        with pytest.raises(KeyError, match="mine"):
            await batcher.embed_many(source())
        assert batcher.stats().queued == 0


async def test_who_gives_many_texts_up_leaves_nothing_behind():
    transport = VectorTransport(delay=10.0)
    async with batcher_for(transport) as batcher:
        task = asyncio.ensure_future(batcher.embed_many(texts(20_000)))
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stats = batcher.stats()
        assert stats.queued == 0
        assert stats.cancelled == stats.items > 0


# --- what is wrong with the arguments


class NoEmbed:
    model = "m"

    async def send(self, call, on_text):
        raise AssertionError

    async def aclose(self):
        pass


@each(
    "text, words",
    [("", "empty"), (7, "string"), (None, "string"), (b"x", "string"), (["x"], "string"), ("\ud800", "surrogate")],
)
async def test_a_text_that_cannot_be_embedded_is_refused_before_anything_is_sent(text, words):
    async with batcher_for(transport := VectorTransport()) as batcher:
        with pytest.raises(mb.ConfigError, match=words):
            await batcher.embed(text)
        with pytest.raises(mb.ConfigError, match=rf"texts\[2\].*{words}"):
            await batcher.embed_many(["a", "b", text, "c"])
        assert batcher.stats().queued == 0
    assert transport.calls == []


@each("texts", ["one", b"one", 7, None])
async def test_what_is_no_list_of_texts_is_refused(texts):
    async with batcher_for(VectorTransport()) as batcher:
        with pytest.raises(mb.ConfigError, match="embed"):
            await batcher.embed_many(texts)


@each(
    "options, words",
    [
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 1.5}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"model": 7}, "model"),
        ({"tenant": 7}, "tenant"),
        ({"priority": "urgent"}, "priority"),
        ({"headers": {"a": 1}}, "headers"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": "x"}, "timeout"),
        ({"use_cache": "yes"}, "use_cache"),
        ({"params": 7}, "params"),
        ({"params": {"input": "x"}}, "input"),
        ({"params": {"model": "x"}}, "model"),
        ({"params": {"dimensions": 1}}, "dimensions"),
        ({"params": {"encoding_format": "float"}}, "encoding_format"),
        ({"params": {"extra_body": {"input": "x"}}}, "input"),
        ({"params": {"user": float("nan")}}, "params"),
    ],
)
async def test_a_wrong_option_is_named(options, words):
    async with batcher_for(transport := VectorTransport()) as batcher:
        with pytest.raises(mb.ConfigError, match=words):
            await batcher.embed("x", **options)
        with pytest.raises(mb.ConfigError, match=words):
            await batcher.embed_many(["x"], **options)
        assert batcher.stats().queued == 0
    assert transport.calls == []


async def test_without_a_model_or_a_transport_for_it_the_error_says_what_to_do():
    transport = VectorTransport()
    transport.embedding_model = None
    async with batcher_for(transport) as batcher:
        with pytest.raises(mb.ConfigError, match="embedding_model="):
            await batcher.embed("x")
        assert is_right(await batcher.embed("x", model="named"), "x")
    async with batcher_for(NoEmbed()) as batcher:
        with pytest.raises(mb.ConfigError, match=r"NoEmbed has no embed\(\)"):
            await batcher.embed("x", model="m")


async def test_a_closed_batcher_takes_no_text():
    batcher = batcher_for(VectorTransport())
    with pytest.raises(mb.BatcherClosed):
        await batcher.embed("x")
    async with batcher:
        pass
    for embedding in (batcher.embed("x"), batcher.embed_many(["x"])):
        with pytest.raises(mb.BatcherClosed):
            await embedding


# --- equal texts


async def test_equal_texts_under_way_share_a_call_and_each_caller_has_a_vector_of_its_own():
    transport = VectorTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        first, second, third = await asyncio.gather(*(batcher.embed("same") for _ in range(3)))
        assert transport.sizes == [1]
        first.vector[0] = 9.0
        assert second.vector == third.vector == vector_of("same")
        stats = batcher.stats()
        assert stats.shared == 2
        assert first.usage + second.usage + third.usage == mb.Usage(4)
        await asyncio.gather(*(batcher.embed("same", use_cache=False) for _ in range(3)))
    assert transport.sizes == [1, 3]


async def test_vectors_are_cached_and_each_caller_has_a_copy():
    transport, cache = VectorTransport(), mb.MemoryCache()
    async with batcher_for(transport, cache) as batcher:
        first = await batcher.embed("kept")
        first.vector[0] = 9.0
        second = await batcher.embed("kept")
        second.vector[0] = 9.0
        third = await batcher.embed("kept")
        assert third.vector == vector_of("kept")
        assert (third.usage, third.cost_usd, third.model) == (mb.Usage(), 0.0, "embedder-1")
        assert transport.sizes == [1]
        assert batcher.stats().cache_hits == 2
        await batcher.embed("kept", use_cache=False)
        await batcher.embed("kept", use_cache="refresh")
        assert transport.sizes == [1, 1, 1]
    async with batcher_for(transport, cache) as batcher:  # another process
        assert is_right(await batcher.embed("kept"), "kept")
        assert batcher.stats().cache_hits == 1


async def test_a_refresh_replaces_the_vector_that_the_cache_has():
    transport = VectorTransport(lambda number, _, pairs: [(index, array("f", [number] * 2)) for index, _ in pairs])
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        assert [(await batcher.embed("x", use_cache=how)).vector[0] for how in (True, True, "refresh", True)] == [
            *(0, 0, 1, 1)
        ]


@each(
    "options",
    [
        {"model": "other"},
        {"dimensions": 3},
        {"params": {"input_type": "query"}},
        {"headers": {"X-Team": "t"}},
        {"tenant": "t"},
    ],
)
async def test_what_may_change_a_vector_or_says_who_may_see_it_is_part_of_its_key(options):
    transport = VectorTransport()
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        await batcher.embed("x")
        await batcher.embed("x", **options)
        assert batcher.stats().cache_hits == 0
        await batcher.embed("x", priority="high")
        await batcher.embed("x", params={"user": "u"})
        assert batcher.stats().cache_hits == 2


async def test_the_timeout_of_many_texts_covers_their_look_up_too():
    class Hanging(mb.MemoryCache):
        async def get_many(self, keys):
            await asyncio.sleep(60.0)
            return await super().get_many(keys)

    transport = VectorTransport(delay=1.0)
    async with batcher_for(transport, Hanging()) as batcher:
        begun = now()
        with pytest.raises(mb.DeadlineExceeded):
            await batcher.embed_many(texts(600), timeout=0.5)
        assert now() - begun == pytest.approx(0.5, abs=0.01)
        assert all(is_right(*pair) for pair in zip(await batcher.embed_many(texts(3)), texts(3), strict=True))
    stats = batcher.stats()
    assert stats.queued == stats.in_flight == 0
    assert stats.items == stats.answered + stats.failed + stats.cancelled


async def test_many_texts_are_looked_up_and_kept_as_well():
    transport = VectorTransport()
    async with batcher_for(transport, mb.MemoryCache()) as batcher:
        await batcher.embed_many(texts(600))
        found = await batcher.embed_many(texts(900))
    assert sum(transport.sizes) == 900
    assert all(is_right(*pair) for pair in zip(found, texts(900), strict=True))
    assert batcher.stats().cache_hits == 600


# --- what it costs

PRICES = {"embedder": mb.Price(2.0), "embedder-1": mb.Price(2.0)}


async def test_shares_by_tokens_add_up_to_the_report_and_to_its_price():
    transport = VectorTransport()
    async with batcher_for(transport, prices=PRICES) as batcher:
        found = await embed_all(batcher, wanted := [f"{'x' * number}." for number in range(50)])
        stats = batcher.stats()
    assert sum(each.usage.prompt_tokens for each in found) == stats.prompt_tokens == sum(map(tokens_of, wanted))
    assert not any(each.usage.estimated for each in found)
    assert (
        sum(each.cost_usd for each in found)
        == pytest.approx(stats.cost_usd)
        == pytest.approx(2e-6 * stats.prompt_tokens)
    )
    assert found[40].usage.prompt_tokens > found[10].usage.prompt_tokens > 0
    assert (stats.unbatched_calls, stats.unbatched_prompt_tokens) == (50, stats.prompt_tokens)
    assert stats.unclaimed == mb.Usage()
    assert (stats.items, stats.answered, stats.upstream_calls, stats.batches) == (50, 50, 1, 1)


async def test_without_a_report_usage_is_an_estimate():
    async with batcher_for(VectorTransport(usage=False)) as batcher:
        found = await batcher.embed("some text")
        assert found.usage.estimated
        assert batcher.stats().unreported_calls == 1


async def test_the_price_is_that_of_the_model_that_has_answered():
    async with batcher_for(
        VectorTransport(), prices={"embedder-1": mb.Price(1.0), "embedder": mb.Price(7.0)}
    ) as batcher:
        assert (await batcher.embed("four")).cost_usd == pytest.approx(4e-6)


async def test_list_prices_of_embedding_models_have_no_output():
    async with batcher_for(VectorTransport()) as batcher:
        found = await batcher.embed("four", model="text-embedding-3-small")
    assert found.cost_usd == pytest.approx(4 * 0.02e-6)


async def test_a_budget_pays_for_texts():
    transport = VectorTransport()
    budget = mb.Budget(usd=20e-6)
    async with batcher_for(transport, prices=PRICES, budget=budget) as batcher:
        await batcher.embed("12345")
        with pytest.raises(mb.BudgetExceeded):
            await batcher.embed("1234567")
        await batcher.embed("abcde")
        with pytest.raises(mb.ConfigError, match="price"):
            await batcher.embed("x", model="unpriced")
        assert batcher.stats().budget.spent_usd == pytest.approx(20e-6)
    assert transport.sizes == [1, 1]


async def test_a_limit_on_tokens_is_charged_by_the_texts():
    transport = VectorTransport()
    limit = mb.RateLimit(tpm=600)
    async with batcher_for(transport, rate_limit=limit, max_wait=0.0) as batcher:
        await batcher.embed_many(texts(20, 100))
        with pytest.raises(mb.ConfigError, match="700 tokens"):
            await batcher.embed("x" * 700)
        assert batcher.stats().queued == 0
    assert max(sum(map(len, call.inputs)) for call in transport.calls) <= 600
    assert now() > 120.0


async def test_a_limit_on_tokens_gets_back_what_the_endpoint_did_not_count():
    transport = VectorTransport(scale=0.1)
    async with batcher_for(transport, rate_limit=mb.RateLimit(tpm=600)) as batcher:
        await batcher.embed("x" * 500)
        await batcher.embed("y" * 500)
    assert now() < 1.0


async def test_hooks_see_texts_as_they_see_messages():
    class Hook:
        def __init__(self):
            self.seen = []

        def on_submit(self):
            return "origin"

        def on_flush(self, event):
            self.seen.append(event)

        on_call = on_settle = on_flush

    hook = Hook()
    async with batcher_for(VectorTransport(), mb.MemoryCache(), hooks=[hook], prices=PRICES) as batcher:
        await embed_all(batcher, ["aa", "bb"], tenant="t")
        await batcher.embed("aa", tenant="t")
    flushed, *settled, called, hit = hook.seen
    assert (flushed.reason, flushed.size, flushed.model) == ("idle", 2, "embedder")
    assert [(each.route, each.usage, each.batch_size, each.origin, each.tenant) for each in settled] == [
        ("batch", mb.Usage(2), 2, "origin", "t")
    ] * 2
    assert (called.operation, called.route, called.size, called.usage) == ("embeddings", "batch", 2, mb.Usage(4))
    assert (called.streamed, called.max_tokens, called.temperature) == (False, None, None)
    assert called.cost_usd == called.unbatched_cost_usd == pytest.approx(8e-6)
    assert (hit.route, hit.cost_usd, hit.unbatched_cost_usd) == ("cache", 0.0, pytest.approx(4e-6))


# --- limits, retries, deadlines


async def test_a_transient_failure_is_retried():
    def spoil(number, inputs, pairs):
        if number < 2:
            raise mb.ServerError("busy", status=503)
        return pairs

    transport = VectorTransport(spoil)
    async with batcher_for(transport) as batcher:
        assert is_right(await batcher.embed("x"), "x")
        stats = batcher.stats()
    assert (stats.upstream_calls, stats.retries) == (3, 2)


async def test_an_error_of_no_text_ends_all_and_is_not_bisected():
    def spoil(*_):
        raise mb.BadRequest("no such model", status=404)

    transport = VectorTransport(spoil)
    async with batcher_for(transport) as batcher:
        found = await asyncio.gather(*(batcher.embed(text) for text in texts(9)), return_exceptions=True)
    assert {type(each) for each in found} == {mb.BadRequest}
    assert len({id(each) for each in found}) == 9
    assert transport.sizes == [9]


async def test_lists_that_are_forbidden_stop_no_other_calls_of_the_key():
    def spoil(_, inputs, pairs):
        if len(inputs) > 1:
            raise mb.AuthFailed("your key may not send lists", status=403)
        return pairs

    transport = VectorTransport(spoil)
    async with batcher_for(transport) as batcher:
        await batcher.embed("which works")
        found = await embed_all(batcher, texts(8))
    assert all(is_right(*pair) for pair in zip(found, texts(8), strict=True))


async def test_a_foreign_error_of_the_transport_ends_as_a_typed_one():
    def spoil(*_):
        raise ZeroDivisionError

    async with batcher_for(VectorTransport(spoil)) as batcher:
        with pytest.raises(mb.TransportError, match="ZeroDivisionError"):
            await batcher.embed("x")
        assert batcher.stats().queued == 0


async def test_a_deadline_ends_a_text_alone():
    transport = VectorTransport(delay=5.0)
    async with batcher_for(transport) as batcher:
        late, found = await asyncio.gather(
            batcher.embed("late", timeout=1.0), batcher.embed("found"), return_exceptions=True
        )
        assert isinstance(late, mb.DeadlineExceeded)
        assert is_right(found, "found")


async def test_the_last_caller_that_leaves_ends_the_call():
    transport = VectorTransport(delay=1_000.0)
    async with batcher_for(transport) as batcher:
        tasks = [asyncio.ensure_future(batcher.embed(text)) for text in texts(3)]
        await asyncio.sleep(1.0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await asyncio.sleep(1.0)
        stats = batcher.stats()
        assert (stats.queued, stats.in_flight, stats.cancelled) == (0, 0, 3)
    assert now() < 10.0


async def test_closing_sends_what_waits_and_ends_the_rest():
    transport = VectorTransport(delay=10.0)
    batcher = await batcher_for(transport, idle="wait", max_wait=100.0).open()
    tasks = [asyncio.ensure_future(batcher.embed(text)) for text in texts(3)]
    await asyncio.sleep(1.0)
    await batcher.aclose()
    assert all(is_right(*pair) for pair in zip(await asyncio.gather(*tasks), texts(3), strict=True))
    batcher = await batcher_for(transport).open()
    tasks = [asyncio.ensure_future(batcher.embed(text)) for text in texts(3)]
    await asyncio.sleep(1.0)
    await batcher.aclose(grace=1.0)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in found} == {mb.ShutDown}


async def test_a_full_queue_is_full_for_texts_too():
    async with batcher_for(VectorTransport(delay=1.0), max_queued=2, when_full="reject") as batcher:
        found = await asyncio.gather(*(batcher.embed(text) for text in texts(3)), return_exceptions=True)
        assert [type(each) for each in found] == [mb.Embedding, mb.Embedding, mb.Overloaded]
    async with batcher_for(VectorTransport(delay=1.0), max_queued=1) as batcher:
        assert len(await embed_all(batcher, texts(3))) == 3


async def test_beyond_a_full_queue_a_text_waits_for_no_others():
    transport = VectorTransport(delay=10.0)
    async with batcher_for(transport, max_queued=1, when_full="bypass", max_wait=50.0) as batcher:
        first = asyncio.ensure_future(batcher.embed("first"))
        await asyncio.sleep(1.0)
        assert is_right(await batcher.embed("second"), "second")
        assert now() == 11.0
        await first
