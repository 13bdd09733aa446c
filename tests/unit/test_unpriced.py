"""Dollars where some models have a price and others have none: the sums are those of the priced calls, on both sides."""

from __future__ import annotations

import asyncio

import prometheus_client
import pytest
from helpers import ask, batcher_for, submit_all

import microbatch as mb
from microbatch.accounting.stats import Ledger, together
from microbatch.batching.overhead import LaneEconomics
from microbatch.messages import Usage
from microbatch.protocols import Completion
from microbatch.testing import ScriptedTransport

PRICE = mb.Price(2.0, 8.0, 0.5, tiers={"flex": mb.Price(1.0, 4.0, 0.25), "priority": mb.Price(4.0, 16.0)})
PRICES = {"priced": PRICE}
ONE, TWO = Usage(1_000, 100), Usage(2_000, 300)


@pytest.fixture(autouse=True)
def no_list_prices(monkeypatch):
    monkeypatch.setattr("microbatch.accounting.prices.find_spec", lambda _: None)


def dollars(stats):
    return stats.cost_usd, stats.unbatched_cost_usd, stats.damage_cost_usd, stats.audit_cost_usd


# --- sums


@pytest.mark.parametrize("order", [("priced", "other"), ("other", "priced"), ("other", "priced", "other")])
async def test_a_model_without_a_price_hides_no_dollars_of_the_others(order):
    async with batcher_for(ScriptedTransport(), prices=PRICES) as batcher:
        replies = {}
        for model in order:
            replies[model] = await submit_all(batcher, ["a", "b", "c"], model=model)
            for reply in replies[model]:
                await reply.settled()
    stats = batcher.stats()
    assert {reply.cost_usd for reply in replies["other"]} == {None}
    assert stats.cost_usd == pytest.approx(sum(reply.cost_usd for reply in replies["priced"]))
    assert stats.unpriced_calls == order.count("other")
    assert stats.prompt_tokens > sum(reply.usage.prompt_tokens for reply in replies["priced"])


async def test_both_sides_of_the_comparison_leave_out_the_same_calls():
    async with batcher_for(ScriptedTransport(), prices=PRICES, cache=mb.MemoryCache()) as alone:
        await submit_all(alone, ["a", "b", "c"], model="priced")
    async with batcher_for(ScriptedTransport(), prices=PRICES, cache=mb.MemoryCache()) as mixed:
        await submit_all(mixed, ["a", "b", "c"], model="priced")
        await submit_all(mixed, ["a", "b", "c", "a"], model="other")  # with a caller that joins another
        await submit_all(mixed, ["a", "b"], model="other")  # from the cache
    assert dollars(mixed.stats()) == pytest.approx(dollars(alone.stats()))
    assert mixed.stats().costs_more == alone.stats().costs_more


async def test_before_the_first_call_nothing_is_spent_and_of_unpriced_calls_alone_nothing_is_known():
    async with batcher_for(ScriptedTransport(), prices=PRICES) as batcher:
        assert dollars(batcher.stats()) == (0.0, 0.0, 0.0, 0.0)
        await batcher.submit(ask("a"), model="other")
        assert dollars(batcher.stats())[:2] == (None, None)
        await batcher.submit(ask("a"), model="priced")
        assert None not in dollars(batcher.stats())


async def test_a_free_model_is_priced():
    async with batcher_for(ScriptedTransport(), prices={"free": mb.Price(0.0, 0.0)}) as batcher:
        for model in ("other", "free", "other"):
            await batcher.submit(ask(model), model=model)
        assert dollars(batcher.stats())[:2] == (0.0, 0.0)
        assert batcher.stats().unpriced_calls == 2


def test_damage_and_audits_are_summed_like_the_rest():
    ledger = Ledger()
    ledger.pay(ONE, Usage(), None, damage=True)
    ledger.pay_beside("audit", ONE, None)
    assert dollars(ledger.snapshot()) == (None, 0.0, None, None)
    ledger.pay(ONE, Usage(), PRICE.cost, damage=True)
    ledger.pay_beside("audit", TWO, PRICE.cost)
    ledger.pay_beside("audit", TWO, None)
    ledger.pay(TWO, Usage(), None, damage=True)
    costs = PRICE.cost(ONE), PRICE.cost(TWO)
    assert dollars(ledger.snapshot()) == pytest.approx((sum(costs), 0.0, *costs))
    assert ledger.snapshot().unpriced_calls == 4
    assert ledger.damage_usage == ONE + ONE + TWO


def test_combining_is_judged_by_the_priced_calls_alone():
    """The unpriced calls lose many tokens, the priced ones save dollars."""
    ledger = Ledger()
    ledger.pay(TWO, ONE, None)
    assert ledger.snapshot().costs_more
    ledger.pay(Usage(100, 10), Usage(300, 10), PRICE.cost)
    assert not ledger.snapshot().costs_more
    assert (
        ledger.comparison
        == f"{PRICE.cost(Usage(100, 10)):.4f} USD against about {PRICE.cost(Usage(300, 10)):.4f} one by one"
    )


@pytest.mark.parametrize("price", [PRICE.cost, None])
def test_a_correction_of_single_calls_is_taken_from_calls_of_its_own_kind(price):
    other = None if price else PRICE.cost
    ledger = Ledger()
    ledger.correct(Usage(-500, -50), price)
    ledger.pay(Usage(), ONE, other)
    assert ledger.unbatched_prompt_tokens == 1_000
    ledger.pay(Usage(), ONE, price)
    assert (ledger.unbatched_prompt_tokens, ledger.unbatched_completion_tokens) == (1_500, 150)
    priced = ONE if other else Usage(500, 50)
    assert ledger.unbatched_cost_usd == pytest.approx(PRICE.cost(priced))


def test_a_correction_keeps_what_single_calls_would_have_written_to_the_cache():
    price = mb.Price(1.0, 1.0, cache_write=3.0)
    ledger = Ledger()
    ledger.correct(Usage(-100, 0), price.cost)
    ledger.pay(Usage(10, 0), Usage(1_000, 0, 200, cache_write_tokens=800), price.cost)
    assert ledger.unbatched_prompt_tokens == 900
    assert ledger.unbatched_cost_usd == pytest.approx((200 + 700 * 3) / 1e6)


@pytest.mark.parametrize("again", [None, PRICE.cost, PRICE.of_tier("flex").cost])
def test_a_lane_is_judged_alike_whether_its_fallback_calls_have_a_price_or_not(again):
    for tokens, lost in ((100, False), (5_000, True)):
        economics = LaneEconomics()
        for _ in range(20):
            economics.begin(4)
            economics.record(Usage(1_000, 100), Usage(4_000, 100), PRICE.cost, again=False)
            economics.record(Usage(tokens, 0), Usage(), again, again=True)
        assert economics.lost is lost


@pytest.mark.parametrize(
    ("parts", "total"),
    [
        ([None, 2.0, None], 2.0),
        ([1.0, 2.0], 3.0),
        ([None, None], None),
        ([None, 0.0], None),  # the other has done nothing
        ([0.0, 0.0], 0.0),
    ],
)
def test_the_figures_of_several_batchers_are_those_of_their_priced_calls(parts, total):
    stats = together([mb.Stats(cost_usd=cost, unpriced_calls=cost is None) for cost in parts])
    assert stats.cost_usd == total
    assert stats.unpriced_calls == parts.count(None)


# --- service tiers


def tiered(tier, usage=TWO, model=None):
    def answer(received):
        answers = [(name, text.upper()) for name, text in received.items]
        text = received.reply(answers) if received.combined else answers[0][1]
        return text, Completion("stop", usage=usage, service_tier=tier, model=model)

    return answer


@pytest.mark.parametrize("texts", [["a"], ["a", "b", "c", "d"]])
@pytest.mark.parametrize("tier", ["flex", "priority", None, "scale"])
async def test_a_call_costs_what_its_service_tier_does(tier, texts):
    transport = ScriptedTransport(*[tiered(tier)] * 4)
    async with batcher_for(transport, prices=PRICES, idle="wait", max_wait=0.5) as batcher:
        replies = await submit_all(batcher, texts, model="priced")
        for reply in replies:
            await reply.settled()
    assert len(transport.calls) == 1
    expected = PRICE.of_tier(tier).cost(TWO)
    assert batcher.stats().cost_usd == pytest.approx(expected)
    assert sum(reply.cost_usd for reply in replies) == pytest.approx(expected)


async def test_the_parts_of_a_long_call_cost_what_the_whole_call_does():
    prices = {"priced": mb.Price(1.0, 2.0, above={1_500: mb.Price(3.0, 4.0)})}
    async with batcher_for(ScriptedTransport(tiered(None)), prices=prices, idle="wait", max_wait=0.5) as batcher:
        replies = await submit_all(batcher, ["a", "b"], model="priced")
        for reply in replies:
            await reply.settled()
    assert batcher.stats().cost_usd == pytest.approx(mb.Price(3.0, 4.0).cost(TWO))
    assert sum(reply.cost_usd for reply in replies) == pytest.approx(batcher.stats().cost_usd)


async def test_the_price_of_the_model_asked_for_holds_where_the_name_in_the_reply_has_none():
    async with batcher_for(ScriptedTransport(tiered("flex", model="snapshot-7")), prices=PRICES) as batcher:
        reply = await (await batcher.submit(ask("a"), model="priced")).settled()
    assert reply.model == "snapshot-7"
    assert reply.cost_usd == pytest.approx(PRICE.of_tier("flex").cost(TWO))


# --- metrics


async def test_metrics_do_not_show_zero_dollars_where_nothing_is_known():
    hooks = mb.PrometheusHooks(registry=prometheus_client.CollectorRegistry())
    async with batcher_for(ScriptedTransport(), hooks=[hooks], prices=PRICES) as batcher:
        hooks.watch(batcher)

        async def shown(model):
            await batcher.submit(ask(model), model=model)
            await asyncio.sleep(0)
            lines = hooks.render().decode().splitlines()
            return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("microbatch_")}

        assert "microbatch_cost_usd_total 0.0" in hooks.render().decode()
        metrics = await shown("other")
        assert not [name for name in metrics if name.endswith("cost_usd_total")]
        assert metrics["microbatch_unpriced_calls_total"] == 1
        await shown("priced")
        metrics = await shown("other-2")
        assert metrics["microbatch_cost_usd_total"] == pytest.approx(batcher.stats().cost_usd)
        assert metrics["microbatch_unbatched_cost_usd_total"] == pytest.approx(batcher.stats().unbatched_cost_usd)
        assert metrics["microbatch_unpriced_calls_total"] == 2
