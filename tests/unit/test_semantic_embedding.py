"""The vectors of look-ups from the batcher's own endpoint: calls, cost, refusals."""

import asyncio
from array import array

import pytest
from helpers import batcher_for, each, now
from similar_world import Embedder, Naming, ask_about, prove, semantic, settled

import microbatch as mb

TOKENS = 7  # of each text


class Endpoint(Naming):
    """Names things, and embeds texts as `Embedder` does."""

    def __init__(self, **options):
        super().__init__(embedding_model="vectors", **options)
        self.embedded, self.takes, self.embed_delay, self.fault = [], 2_048, 0.0, None
        self.refuses = None  # a part of the texts that are refused
        self._embedder = Embedder()

    async def embed(self, call):
        self.embedded.append(call)
        if self.embed_delay:
            await asyncio.sleep(self.embed_delay)
        if self.fault is not None:
            raise self.fault
        if self.refuses is not None and any(self.refuses in text for text in call.inputs):
            raise mb.BadRequest("an input is not allowed", status=400)
        if len(call.inputs) > self.takes:
            raise mb.BadRequest("too many inputs", status=400)
        vectors = [array("f", self._embedder.vector(text)) for text in call.inputs]
        return mb.Embedded(vectors=[*enumerate(vectors)], usage=mb.Usage(TOKENS * len(vectors)), model="vectors")


class Bare:
    """A transport without `embed`."""

    async def send(self, call, on_text):
        raise NotImplementedError

    async def aclose(self):
        pass


def own_batcher(transport, **options):
    cache = mb.SemanticCache(mb.MemoryCache(), **{"max_error": 0.05, **options.pop("semantic", {})})
    return batcher_for(transport, cache, **options)


async def test_the_batchers_own_endpoint_embeds():
    transport = Endpoint()
    async with own_batcher(transport) as batcher:
        await prove(batcher)
        assert (await batcher.submit(ask_about("amber", 900))).route == "similar"
        assert {call.model for call in transport.embedded} == {"vectors"}


async def test_the_texts_of_a_step_are_one_call_and_those_of_other_tenants_another():
    transport = Endpoint()
    async with own_batcher(transport) as batcher:
        asking = [batcher.submit(ask_about("amber", n), tenant=tenant) for n in range(30) for tenant in ("a", "b")]
        await asyncio.gather(*asking)
        assert sorted(len(call.inputs) for call in transport.embedded) == [30, 30]


async def test_headers_of_the_caller_go_with_its_text():
    transport = Endpoint()
    async with own_batcher(transport) as batcher:
        headers = {"authorization": "Bearer x", "traceparent": "1"}
        await batcher.submit(ask_about("amber", 0), headers=headers)
        assert [call.headers for call in transport.embedded] == [{"authorization": "Bearer x"}]


async def test_look_ups_are_paid_for_and_belong_to_no_reply():
    transport = Endpoint()
    prices = {"vectors": mb.Price(input=1.0, output=0.0), "chat": mb.Price(input=10.0, output=20.0)}
    transport.model = "chat"
    called = []

    class Notes:
        def on_call(self, event):
            called.append(event)

    async with own_batcher(transport, prices=prices, hooks=[Notes()]) as batcher:
        await prove(batcher)
        found = [await batcher.submit(ask_about("amber", 900 + n)) for n in range(40)]
        await asyncio.sleep(10)
        stats = batcher.stats()
    look_ups = [event for event in called if event.route == "look_up"]
    assert len(look_ups) == len(transport.embedded)
    assert stats.look_up_usage.prompt_tokens == TOKENS * sum(event.size for event in look_ups)
    assert stats.look_up_cost_usd == pytest.approx(stats.look_up_usage.prompt_tokens / 1e6)
    assert stats.items == stats.answered == stats.look_ups
    told = sum(event.usage.prompt_tokens for event in called)
    assert stats.prompt_tokens == told
    assert stats.unclaimed.prompt_tokens == stats.look_up_usage.prompt_tokens + stats.check_usage.prompt_tokens
    assert [reply.route for reply in found] == ["similar"] * 40
    assert all(reply.usage == mb.Usage() and reply.cost_usd == 0.0 for reply in found)
    assert stats.similar_saved_usd > 0
    net = stats.similar_saved_usd - stats.look_up_cost_usd - stats.check_cost_usd
    assert stats.similar_net_usd == pytest.approx(net)


async def test_a_refused_list_is_a_miss_and_later_lists_are_shorter():
    transport = Endpoint()
    transport.takes = 8
    async with own_batcher(transport, max_batch_size=1) as batcher:
        for burst in range(5):
            await asyncio.gather(*(batcher.submit(ask_about("amber", 40 * burst + n)) for n in range(32)))
        assert batcher.stats().look_ups_failed == 32 * 2
        assert [len(call.inputs) for call in transport.embedded] == [32, 16, 16, *[8] * 12]


async def test_a_text_that_is_refused_does_not_make_lists_shorter():
    transport = Endpoint()
    # In one question of each burst but the first.
    transport.refuses = "please briefly answer me what you know of the bread"
    async with own_batcher(transport, max_batch_size=1) as batcher:
        for numbers in ((300, 340), (10, 11), (10, 42), (340, 380), (10, 42), (380, 400)):
            await asyncio.gather(*(batcher.submit(ask_about("amber", n), use_cache="refresh") for n in range(*numbers)))
        assert [len(call.inputs) for call in transport.embedded] == [40, 1, 32, 40, 32, 20]


async def test_lists_become_shorter_if_those_of_a_length_that_was_taken_are_refused_from_now_on():
    transport = Endpoint()
    async with own_batcher(transport, max_batch_size=1) as batcher:
        for burst, takes in enumerate((2_048, 8, 8, 8, 8)):
            transport.takes = takes
            await asyncio.gather(*(batcher.submit(ask_about("amber", 40 * burst + n)) for n in range(32)))
        assert [len(call.inputs) for call in transport.embedded] == [32, 32, 32, 16, 16, *[8] * 4]


@each("fault", [mb.ServerError("down", status=500), mb.ConnectFailed("gone"), mb.AuthFailed("no", status=401)])
async def test_an_endpoint_that_embeds_nothing_delays_nothing(fault):
    transport = Endpoint()
    async with own_batcher(
        transport, semantic={"lookup_timeout": 0.1}, retry=mb.RetryPolicy(max_attempts=1)
    ) as batcher:
        await prove(batcher)
        transport.fault = fault
        begun = now()
        reply = await batcher.submit(ask_about("amber", 900))
        assert (reply.route, now() - begun) == ("single", pytest.approx(0.2))


async def test_a_late_endpoint_is_given_up():
    transport = Endpoint()
    async with own_batcher(transport, semantic={"lookup_timeout": 0.1}) as batcher:
        transport.embed_delay = 60.0
        for number in range(3):
            assert (await batcher.submit(ask_about("amber", number))).route == "single"
        await asyncio.sleep(1)
        assert batcher.stats().look_ups_late == 3
        assert batcher.stats().in_flight == 0


async def test_look_ups_yield_to_a_budget():
    transport = Endpoint()
    async with own_batcher(transport, budget=mb.Budget(tokens=3_000)) as batcher:
        with pytest.raises(mb.BudgetExceeded):
            for number in range(500):
                await batcher.submit(ask_about("amber", number))
        await settled(batcher)


def test_an_endpoint_without_embeddings_is_refused_at_once():
    with pytest.raises(mb.ConfigError, match=r"SemanticCache\(embed=\)"):
        batcher_for(Bare(), mb.SemanticCache(mb.MemoryCache()))
    nameless = Endpoint()
    nameless.embedding_model = None
    with pytest.raises(mb.ConfigError, match="model="):
        batcher_for(nameless, mb.SemanticCache(mb.MemoryCache()))
    batcher_for(nameless, mb.SemanticCache(mb.MemoryCache(), model="m"))
    batcher_for(Bare(), semantic())
