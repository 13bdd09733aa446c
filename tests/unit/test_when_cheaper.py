"""`merge="when-cheaper"` combines where that is cheaper, with what prefix caches do; `merge="auto"` where a price decides."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest
from helpers import ask, each

import microbatch as mb
from bench import cheaper
from bench.questions import Label, products, shared_instructions
from microbatch.batching.overhead import CacheReports, LaneEconomics, PrefixCache, in_prompt_tokens
from microbatch.messages import Limits, Usage
from microbatch.testing import SimulatedModel, SimulatedTransport

PRICES = list(itertools.product(cheaper.OUTPUT, cheaper.CACHED))
QUESTIONS = [*products()]


# --- all cells of prices, shared tokens, sizes and kinds of answers


@pytest.fixture(scope="module")
def cells():
    return [cheaper.cell(*name, 2) for name in itertools.product(cheaper.KINDS, cheaper.SHARED, cheaper.SIZES)]


def test_every_cell_is_decided_right_before_anything_is_measured_and_after(cells):
    """Real prompts and replies are counted and priced apart from the calculation. Ties are within 1 %."""
    ties = sum(cheaper.tied(cell, *prices) for cell in cells for prices in PRICES)
    together = sum(cheaper.advantage(cell, *prices) > 0 for cell in cells for prices in PRICES)
    assert len(cells) * len(PRICES) == 1_200
    assert ties <= 24
    assert 800 < together < 1_000
    for moment in cheaper.MOMENTS:
        assert list(cheaper.wrong(cells, moment)) == [], moment


@each("kind, shared, size", [("labels", 1_146, 3), ("texts", 1_021, 6), ("texts", 1_150, 2), ("labels", 2_170, 5)])
def test_the_last_tokens_before_a_step_of_the_cache_are_counted_too(kind, shared, size):
    """A few tokens decide about 128 for each single call: those that frame the messages belong to the common beginning."""
    cell = cheaper.cell(kind, shared, size, 2)
    for moment in cheaper.MOMENTS:
        assert list(cheaper.wrong([cell], moment)) == [], moment


async def routes(transport, price, *, system, size, rounds=4, merge="when-cheaper", output_type=Label, **options):
    """Ask *size* questions at once, *rounds* times; return the routes of each round and the figures."""
    prices = {} if price is None else {"m": price}
    policy = mb.FlushPolicy(merge=merge, max_batch_size=size, idle="wait", max_output_tokens=10**6)
    questions, taken = itertools.cycle(QUESTIONS), []
    async with mb.Microbatcher(transport, policy=policy, prices=prices, **options) as batcher:
        for _ in range(rounds):
            texts = itertools.islice(questions, size)
            asked = (batcher.submit(ask(text, system), model="m", output_type=output_type) for text in texts)
            taken.append({reply.route for reply in await asyncio.gather(*asked)})
        return taken, batcher.stats()


@each("output, cached", [(2.0, 1.0), (8.0, 0.10), (4.0, 0.02), (8.0, 0.02)])
async def test_a_batcher_takes_the_cheaper_way_from_the_first_request_on(output, cached, cells):
    labels = products()
    for cell in cells:
        better = cheaper.advantage(cell, output, cached)
        if cell.shared not in (20, 3_000) or cell.size not in (2, 16) or abs(better) < 0.03:
            continue
        answer = cheaper.answer if cell.kind == "texts" else lambda text, _: labels[text]
        taken, _ = await routes(
            SimulatedTransport(SimulatedModel(cached_prefixes=True, answer=answer)),
            mb.Price(1.0, output, cached),
            system=shared_instructions(cell.shared),
            size=cell.size,
            rounds=3,
            output_type=cheaper.KINDS[cell.kind],
        )
        assert taken == [{"batch" if better > 0 else "single"}] * 3, cell


# --- endpoints whose caches are other than OpenAI's


class OtherCache(SimulatedTransport):
    """Reports *cached(prompt tokens, combined)* tokens as read from the cache, and *written* of the rest as written to it."""

    def __init__(self, cached, written=0.0):
        super().__init__(SimulatedModel())
        self.cached, self.written = cached, written

    async def send(self, call, on_text):
        completion = await super().send(call, on_text)
        usage = completion.usage
        cached = self.cached(usage.prompt_tokens, "results" in str(call.schema))
        written = round(self.written * (usage.prompt_tokens - cached))
        completion.usage = msgspec.structs.replace(usage, cached_tokens=cached, cache_write_tokens=written)
        return completion


CHEAP_CACHE = mb.Price(1.0, 8.0, 0.02)
LONG = shared_instructions(3_000)


async def test_where_nothing_is_read_from_the_cache_although_that_has_a_price_combining_pays_from_then_on():
    """Documented are hits, with which two cost more together; the endpoint reports none."""
    taken, _ = await routes(OtherCache(lambda *_: 0), CHEAP_CACHE, system=LONG, size=2, rounds=12)
    assert taken[0] == {"single"}
    assert taken[-6:] == [{"batch"}] * 6


async def test_where_shorter_prefixes_are_read_from_the_cache_single_calls_pay():
    """DeepSeek reads prefixes from 64 tokens on. Documented is nothing below 1,024, where combining two would pay."""
    system = shared_instructions(700)
    for cached, wanted in ((lambda prompt, combined: 640 + 64 * combined, "single"), (lambda *_: 0, "batch")):
        taken, _ = await routes(OtherCache(cached), CHEAP_CACHE, system=system, size=2, rounds=8)
        assert taken[0] == {"batch"}
        assert taken[-2:] == [{wanted}] * 2


async def test_a_fee_for_writing_counts_for_what_calls_write():
    """Combined prompts are longer than 1,024 tokens and written to the cache, single ones are not."""
    system = shared_instructions(120)
    kept = mb.Price(1.0, 4.0, 0.1)
    fee = mb.Price(1.0, 4.0, 0.1, cache_write=4.0)
    for price, wanted in ((kept, "batch"), (fee, "single")):
        taken, _ = await routes(OtherCache(lambda *_: 0), price, system=system, size=16, rounds=2)
        assert taken == [{wanted}] * 2


def test_what_is_known_of_one_kind_of_calls_stands_for_the_other_until_it_was_reported():
    cache = PrefixCache(CacheReports(3_011), CacheReports(3_119))
    assert (cache.usage(cache.alone, 3_100).cached_tokens, cache.usage(cache.combined, 4_000).cached_tokens) == (
        *(2_944, 3_072),
    )
    for sent in range(200):
        cache.learn(cache.combined, Usage(4_000, 10, 3_072 if sent % 2 else 0), sent, sent)
    assert cache.usage(cache.alone, 3_100).cached_tokens == pytest.approx(2_944 / 2, rel=0.1)
    for sent in range(200):
        cache.learn(cache.alone, Usage(3_100, 10, 2_944), sent, sent)
    assert cache.usage(cache.alone, 3_100).cached_tokens == pytest.approx(2_944, rel=0.01)
    assert cache.usage(cache.combined, 4_000).cached_tokens == pytest.approx(3_072 / 2, rel=0.1)


def test_calls_sent_before_the_first_was_answered_say_nothing_about_the_cache():
    cache = PrefixCache(CacheReports(3_011), CacheReports(3_119))
    for sent in (0.0, 0.1, 0.9):
        cache.learn(cache.alone, Usage(3_100, 10), sent, 1.0)
    assert cache.usage(cache.alone, 3_100).cached_tokens == 2_944
    cache.learn(cache.alone, Usage(3_100, 10), 1.0, 2.0)
    assert cache.usage(cache.alone, 3_100).cached_tokens < 1_500


@each("tokens, documented", [(0, 0), (1_023, 0), (1_024, 1_024), (1_151.9, 1_024), (1_152, 1_152), (6_011, 5_888)])
def test_the_documented_steps_of_a_prefix_cache(tokens, documented):
    assert CacheReports(tokens).documented == documented


def test_a_service_tier_is_weighed_by_its_own_price():
    """The tier "priority" charges for generated tokens as for others, the standard one a hundred times as much."""

    async def route(**params):
        price = mb.Price(1.0, 100.0, tiers={"priority": mb.Price(2.0, 2.0)})
        policy = mb.FlushPolicy(merge="when-cheaper", max_batch_size=8, idle="wait")
        batcher = mb.Microbatcher(SimulatedTransport(SimulatedModel()), policy=policy, prices={"m": price})
        async with batcher:
            asked = (batcher.submit(ask(text, "Sort it. " * 20), model="m", params=params) for text in QUESTIONS[:8])
            return {reply.route for reply in await asyncio.gather(*asked)}

    assert asyncio.run(route()) == {"single"}
    assert asyncio.run(route(service_tier="priority")) == {"batch"}


@each(
    "usage, price, tokens",
    [
        (Usage(1_000, 10, 800), None, 1_040.0),
        (Usage(1_000, 10, 800), mb.Price(0.0, 3.0), 1_040.0),
        (Usage(1_000, 10, 800), mb.Price(2.0, 10.0), 1_050.0),
        (Usage(1_000, 10, 800), mb.Price(2.0, 10.0, 0.2), 330.0),
        (Usage(1_000, 10, 800, cache_write_tokens=200), mb.Price(2.0, 10.0, 0.2, cache_write=4.0), 530.0),
    ],
)
def test_usages_are_compared_in_uncached_prompt_tokens(usage, price, tokens):
    assert in_prompt_tokens(usage, price) == pytest.approx(tokens)


# --- merge="auto"


class Reporting(SimulatedTransport):
    """Reports that *left* of 500 requests are left in this minute, one fewer with each call."""

    def __init__(self, left):
        super().__init__(SimulatedModel())
        self.left = left

    async def send(self, call, on_text):
        completion = await super().send(call, on_text)
        completion.limits = Limits(limit_requests=500, remaining_requests=self.left)
        self.left -= 1
        return completion


DEAR = mb.Price(1.0, 100.0)
"""Generated tokens cost so much that nothing is cheaper together."""


@each(
    "price, limit, route, rule",
    [
        (DEAR, None, "single", "priced"),
        (DEAR, mb.RateLimit(tpm=10**9), "single", "priced"),
        (DEAR, mb.RateLimit(rpm=10**6), "batch", "requests_limited"),
        (None, None, "batch", "unpriced"),
        (None, mb.RateLimit(rpm=10**6), "batch", "requests_limited"),
    ],
)
async def test_auto_weighs_costs_where_a_price_is_known_and_requests_are_not_limited(price, limit, route, rule):
    transport = SimulatedTransport(SimulatedModel())
    taken, stats = await routes(transport, price, system="Sort.", size=8, merge="auto", rate_limit=limit)
    assert taken == [{route}] * 4
    assert stats.merge_rules == {rule: 32}


async def test_auto_combines_all_once_the_endpoint_reports_that_few_requests_are_left():
    """Of 500 a fifth is 100; 116 are left at first, and each round of eight takes as many until it binds."""
    taken, stats = await routes(Reporting(116), DEAR, system="Sort.", size=8, merge="auto", rounds=5)
    assert taken == [{"single"}] * 3 + [{"batch"}] * 2
    assert stats.merge_rules == {"priced": 24, "requests_limited": 16}
    taken, _ = await routes(Reporting(5), DEAR, system="Sort.", size=8, merge="when-cheaper", rounds=5)
    assert taken == [{"single"}] * 5, "who asks for the cheaper way gets it"


async def test_requests_that_wait_to_go_alone_are_combined_after_all_once_few_are_left():
    """A bulk run takes in far more than is on the wire, and would wait for the endpoint's limit with all of it."""
    transport = Reporting(112)
    policy = mb.FlushPolicy(merge="auto", max_batch_size=8, max_concurrent_batches=4)
    async with mb.Microbatcher(transport, policy=policy, prices={"m": DEAR}) as batcher:
        requests = [mb.Request(ask(f"{number}", "Sort."), id=f"{number}", model="m") for number in range(1_000)]
        results = [result async for result in batcher.map(requests, max_pending=1_000)]
        stats = batcher.stats()
    assert sorted(int(result.id) for result in results) == list(range(1_000))
    assert all(result.error is None for result in results)
    alone = stats.singles_by_reason["not_cheaper"]
    assert 12 <= alone <= 20
    assert stats.upstream_calls <= alone + 1_000 / 8 + 8
    assert stats.merge_rules == {"priced": alone, "requests_limited": 1_000 - alone}


class Tightening(Reporting):
    """Also reports a limit on tokens, which becomes a small one when few requests are left."""

    async def send(self, call, on_text):
        completion = await super().send(call, on_text)
        tokens = 100_000 if self.left > 100 else 500
        completion.limits = msgspec.structs.replace(completion.limits, limit_tokens=tokens, remaining_tokens=400)
        return completion


async def test_requests_that_are_combined_after_all_are_not_lost_where_the_endpoint_has_lowered_its_limits():
    texts = [f"{number} {'long ' * 700 * (number % 7 == 0)}" for number in range(60)]
    policy = mb.FlushPolicy(merge="auto", max_batch_size=8, max_concurrent_batches=4)
    limit = mb.RateLimit(tpm=100_000)
    async with mb.Microbatcher(Tightening(112), policy=policy, prices={"m": DEAR}, rate_limit=limit) as batcher:
        asked = (batcher.submit(ask(text, "Sort."), model="m", timeout=20_000) for text in texts)
        replies = await asyncio.gather(*asked)
        stats = batcher.stats()
    assert {reply.route for reply in replies} == {"single", "batch"}
    assert stats.merge_rules["requests_limited"] > 0


async def test_always_and_when_cheaper_count_no_rules():
    for merge in ("always", "when-cheaper"):
        _, stats = await routes(SimulatedTransport(SimulatedModel()), DEAR, system="Sort.", size=2, merge=merge)
        assert stats.merge_rules == {}


async def test_audits_and_damage_are_weighed_by_the_price_of_a_bill():
    price, usage, alone = mb.Price(2.0, 10.0, 0.2), Usage(3_000, 40, 2_944), Usage(6_000, 80, 5_888)
    transport = SimulatedTransport(SimulatedModel())
    async with mb.Microbatcher(transport, prices={"m": price}, audit=mb.AuditPolicy()) as batcher:
        await batcher.submit(ask("one", "Sort."), model="m")
        lane = batcher._intake._chat.latest
        assert batcher.audits._cost(lane.spec, usage) == in_prompt_tokens(usage, price) == pytest.approx(550.4)
    for given in (price, None):
        economics = LaneEconomics()
        pricing = None if given is None else given.cost
        economics.record(usage, alone, pricing, again=False)
        economics.record(usage, Usage(), pricing, again=True)
        costs = [in_prompt_tokens(each, given) for each in (usage, usage, alone)]
        assert [economics.combined, economics.again, economics.alone] == pytest.approx(costs)
