"""Budgets and callers: equal requests, hits of the cache, and callers that leave while their call waits for the budget."""

import asyncio

import pytest
from helpers import ask, batcher_for, submit_all

import microbatch as mb
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.promise(of="budget")


class Model(ScriptedTransport):
    """Reports 10 tokens for the prompt and 10 for the answer of each item; counts what it has charged."""

    def __init__(self, *script, delay=1.0, **options):
        super().__init__(*script, delay=delay, **options)
        self.model = "m"
        self.charged = 0

    async def send(self, call, on_text):
        completion = await super().send(call, on_text)
        items = len(self.calls[-1].items)
        completion.usage = mb.Usage(10 * items, 10 * items)
        self.charged += 20 * items
        return completion


def figures(batcher):
    return batcher.stats().budget


async def test_hits_of_the_cache_cost_nothing_and_need_no_budget():
    model, budget = Model(), mb.Budget(tokens=400)
    async with batcher_for(model, budget=budget, cache=mb.MemoryCache(), max_batch_size=1) as batcher:
        await batcher.submit(ask("a"))
        spent = figures(batcher).spent_tokens
        assert spent == model.charged == 20
        for _ in range(3):
            assert (await batcher.submit(ask("a"))).route == "cache"
        assert figures(batcher).spent_tokens == spent
        with pytest.raises(mb.BudgetExceeded):
            await batcher.submit(ask("long " * 400))
        assert (await batcher.submit(ask("a"))).route == "cache"
        with pytest.raises(mb.BudgetExceeded):
            await batcher.submit(ask("long " * 400), use_cache="refresh")
        assert figures(batcher).refused == 2


@pytest.mark.parametrize("size", [1, 8])
async def test_equal_requests_under_way_are_charged_once(size):
    model = Model()
    async with batcher_for(
        model, budget=mb.Budget(tokens=100_000), share=True, max_batch_size=size, max_wait=0.01
    ) as batcher:
        replies = await submit_all(batcher, ["a"] * 5 + ["b"] * 3)
        assert sum(reply.route == "shared" for reply in replies) == 6
        assert figures(batcher).spent_tokens == model.charged == 40
        total = sum((reply.usage for reply in replies), mb.Usage())
        assert total.prompt_tokens + total.completion_tokens == 40


@pytest.mark.parametrize("size", [1, 8])
async def test_equal_requests_all_end_if_their_call_exceeds_the_budget(size):
    model = Model()
    async with batcher_for(
        model, budget=mb.Budget(tokens=5), share=True, max_batch_size=size, max_wait=0.01
    ) as batcher:
        results = await asyncio.gather(*(batcher.submit(ask(t)) for t in "aaab"), return_exceptions=True)
        assert [type(result) for result in results] == [mb.BudgetExceeded] * 4
        assert len({id(result) for result in results}) == 4
        assert not model.calls
        stats = batcher.stats()
        assert (stats.queued, stats.in_flight, stats.failed, stats.upstream_calls) == (0, 0, 4, 0)
        assert figures(batcher).spent_tokens == 0


async def test_each_tenant_pays_for_its_own_equal_and_combined_requests():
    model, budget = Model(), mb.Budget(tokens=3_000, per="tenant")
    async with batcher_for(model, budget=budget, share=True, max_batch_size=4, max_wait=0.01) as batcher:
        tenants = ["t", "t", "u", None] * 2
        replies = await asyncio.gather(
            *(batcher.submit(ask(f"{n // 4}"), tenant=tenant, max_tokens=20) for n, tenant in enumerate(tenants))
        )
        assert sum(reply.route == "shared" for reply in replies) == 2
        now = budget.counters
        spent = {tenant: now.of(tenant, batcher.spending._now()).tokens for tenant in ("t", "u", None)}
        assert spent == dict.fromkeys(("t", "u", None), 40)
        assert figures(batcher).spent_tokens == model.charged == 120
        assert figures(batcher).left_tokens is None


def settled(batcher, budget, *, calls):
    """Check that nothing is held, and that the next request is answered."""
    stats = batcher.stats()
    assert (stats.queued, stats.in_flight) == (0, 0)
    counter = budget.counters.of(None, 0.0)
    assert (counter.calls, counter.held_usd, counter.held_tokens) == (0, 0.0, 0)
    assert counter.tokens == 20 * calls


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("how", ["deadline", "cancel"])
async def test_a_caller_that_leaves_while_its_call_waits_takes_nothing_with_it(how, size):
    model, budget = Model(delay=5.0), mb.Budget(tokens={1: 400, 4: 2_200}[size])
    async with batcher_for(
        model,
        budget=budget,
        max_batch_size=size,
        max_concurrent_batches=2,
        max_wait=0.01,
        rate_limit=mb.RateLimit(rpm=100, tpm=10**6),
    ) as batcher:
        first = asyncio.ensure_future(submit_all(batcher, [f"a{n}" for n in range(size)]))
        await asyncio.sleep(1)
        timeout = 1.0 if how == "deadline" else None
        later = [asyncio.ensure_future(batcher.submit(ask(f"b{n}"), timeout=timeout)) for n in range(3 * size)]
        await asyncio.sleep(0.5)
        assert batcher.stats().in_flight == 1
        if how == "cancel":
            for task in later:
                task.cancel()
        ended = await asyncio.gather(*later, return_exceptions=True)
        assert {type(error) for error in ended} == {
            mb.DeadlineExceeded if how == "deadline" else asyncio.CancelledError
        }
        await asyncio.sleep(0.1)
        assert (batcher.stats().queued, batcher.stats().in_flight) == (size, 1)
        await first
        settled(batcher, budget, calls=size)
        await submit_all(batcher, [f"c{n}" for n in range(size)])
        settled(batcher, budget, calls=2 * size)
        assert len(model.calls) == 2


async def test_one_of_two_callers_that_leaves_takes_no_answer_from_the_other():
    model, budget = Model(delay=5.0), mb.Budget(tokens=400)
    async with batcher_for(model, budget=budget, max_batch_size=1, share=True) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(1)
        impatient = asyncio.ensure_future(batcher.submit(ask("b"), timeout=1))
        other = asyncio.ensure_future(batcher.submit(ask("b")))
        assert isinstance((await asyncio.gather(impatient, return_exceptions=True))[0], mb.DeadlineExceeded)
        assert (await other).output == "B"
        await first
        settled(batcher, budget, calls=2)


@pytest.mark.parametrize("grace", [0.0, 2.0, 60.0])
async def test_closing_ends_what_waits_for_the_budget(grace):
    model, budget = Model(delay=5.0), mb.Budget(tokens=400)
    batcher = await batcher_for(model, budget=budget, max_batch_size=1, max_concurrent_batches=2).open()
    tasks = [asyncio.ensure_future(batcher.submit(ask(f"{n}"))) for n in range(4)]
    await asyncio.sleep(1)
    assert len(model.calls) == 1
    start = asyncio.get_running_loop().time()
    await batcher.aclose(grace=grace)
    took = asyncio.get_running_loop().time() - start
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    if grace > 20:
        assert all(isinstance(each, mb.Reply) for each in ended)
        settled(batcher, budget, calls=4)
    else:
        assert took < grace + 1
        assert [type(each) for each in ended] == [mb.ShutDown] * 4
        assert len(model.calls) == 1
        counter = budget.counters.of(None, 0.0)
        assert counter.calls == 0
        assert counter.tokens > 256  # it is not known what the call has cost


async def test_the_figures_of_a_new_period_are_shown_without_a_call():
    model, budget = Model(), mb.Budget(tokens=600, usd=1.0, period="hour")
    async with batcher_for(model, budget=budget, max_batch_size=1, prices={"m": mb.Price(1000.0, 1000.0)}) as batcher:
        now = [7_190.0]
        batcher.spending._now = lambda: now[0]
        await batcher.submit(ask("a"))
        assert (figures(batcher).spent_tokens, figures(batcher).left_tokens) == (20, 580)
        assert figures(batcher).spent_usd == pytest.approx(0.02)
        now[0] = 7_200.0
        after = figures(batcher)
        assert (after.spent_tokens, after.left_tokens, after.spent_usd, after.left_usd) == (0, 600, 0.0, 1.0)


async def test_what_waits_goes_on_when_the_next_period_begins():
    loop, model, budget = asyncio.get_running_loop(), Model(delay=60.0), mb.Budget(tokens=400, period="hour")
    async with batcher_for(model, budget=budget, max_batch_size=1) as batcher:
        batcher.spending._now = lambda: 7_190.0 + loop.time()
        first = asyncio.ensure_future(batcher.submit(ask("a")))
        await asyncio.sleep(1)
        second = asyncio.ensure_future(batcher.submit(ask("b")))
        await asyncio.sleep(8)
        assert len(model.calls) == 1
        await asyncio.sleep(2)
        assert len(model.calls) == 2
        await asyncio.gather(first, second)
        assert (figures(batcher).spent_tokens, figures(batcher).refused) == (20, 0)
