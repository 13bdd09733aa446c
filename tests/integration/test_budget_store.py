"""Budgets counted in Redis: processes together spend no more than one alone would."""

import asyncio
import itertools
import subprocess
import sys
import textwrap
import time

import pytest
from helpers import ask, batcher_for, until
from redis_server import redis_cluster

import microbatch as mb
from microbatch.spending.counters import span_at
from microbatch.spending.shared import SharedCounters
from microbatch.testing import ScriptedTransport

pytestmark = [pytest.mark.slow, pytest.mark.promise(of="budget")]

PRICES = {"m": mb.Price(100.0, 100.0)}


def model():
    transport = ScriptedTransport()
    transport.model = "m"
    return transport


def batcher_on(url, transport=None, *, retry=None, **budget):
    return batcher_for(
        transport or model(), budget=mb.Budget(**budget, store=url), prices=PRICES, max_batch_size=1, retry=retry
    )


async def ask_until_refused(batcher, **options):
    """Ask one question after the other; return how many were answered, and the refusal."""
    for number in range(10_000):
        try:
            await batcher.submit(ask(f"{number}"), max_tokens=5, **options)
        except mb.BudgetExceeded as error:
            return number, error
    raise AssertionError("never refused")


def total(server, pattern="*"):
    with server.client() as client:
        keys = list(client.scan_iter(f"microbatch:budget:{pattern}"))
        return sum(float(client.hget(key, "usd")) for key in keys), sum(int(client.hget(key, "tokens")) for key in keys)


async def test_batchers_with_one_store_have_one_budget_and_the_server_knows_it(redis_server):
    async with batcher_on(redis_server.url, usd=0.05) as one, batcher_on(redis_server.url, usd=0.05) as other:
        for _ in range(20):
            await one.submit(ask("x"), max_tokens=5)
        mine = one.stats().cost_usd
        answered, error = await ask_until_refused(other)
        assert answered > 20
        assert error.retry_after is None
        together = mine + other.stats().cost_usd
        assert 0.04 < together <= 0.05
        assert total(redis_server)[0] == pytest.approx(together)
        assert other.stats().budget.spent_usd == pytest.approx(together)
        with pytest.raises(mb.BudgetExceeded):
            await one.submit(ask("x" * 400), max_tokens=5)


async def test_a_budget_in_the_store_outlives_the_process_and_grows_with_its_limit(redis_server):
    async with batcher_on(redis_server.url, tokens=500, period="month") as batcher:
        answered, _ = await ask_until_refused(batcher)
        assert answered > 10
    async with batcher_on(redis_server.url, tokens=500, period="month") as batcher:
        assert (await ask_until_refused(batcher))[0] == 0
    async with batcher_on(redis_server.url, tokens=1_000, period="month") as batcher:
        assert (await ask_until_refused(batcher))[0] == pytest.approx(answered, rel=0.1)
    async with batcher_on(redis_server.url, tokens=500, period="month", per="tenant") as batcher:
        assert (await ask_until_refused(batcher, tenant="a"))[0] == answered
        assert (await ask_until_refused(batcher, tenant="b"))[0] == answered
    with redis_server.client() as client:
        end = span_at("month", time.time()).end
        keys = list(client.scan_iter())
        assert len(keys) == 3
        assert all(key.startswith(b"microbatch:budget:") for key in keys)
        assert not any(key.endswith((b":a", b":b")) for key in keys)  # names of tenants may be confidential
        assert all(end <= client.expiretime(key) <= end + 86_400 for key in keys)


async def test_a_charge_and_its_correction_arrive(redis_server):
    transport, go = model(), asyncio.Event()
    answer = transport._usual

    async def wait(received):
        await go.wait()
        return answer(received)

    transport._script = [wait]
    async with batcher_on(redis_server.url, transport, usd=1) as batcher:
        waiting = asyncio.ensure_future(batcher.submit(ask("a")))
        await until(lambda: transport.calls)
        assert total(redis_server)[1] > 256
        go.set()
        reply = await waiting
        assert total(redis_server)[1] == reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert total(redis_server)[0] == pytest.approx(reply.cost_usd)


async def test_a_refused_attempt_is_taken_back_from_the_store(redis_server):
    transport = model()
    transport._script = [mb.BadRequest("no", status=400)]
    async with batcher_on(redis_server.url, transport, usd=1) as batcher:
        with pytest.raises(mb.BadRequest):
            await batcher.submit(ask("a"))
    assert total(redis_server) == (pytest.approx(0), 0)


async def test_nothing_is_sent_while_the_store_cannot_be_used_and_all_goes_on_afterwards(own_redis):
    transport = model()
    async with batcher_on(own_redis.url, transport, tokens=10_000) as batcher:
        await batcher.submit(ask("a"))
        own_redis.kill()
        with pytest.raises(mb.BudgetExceeded) as refused:
            await batcher.submit(ask("b"))
        assert refused.value.retry_after is None
        assert len(transport.calls) == 1
        own_redis.start()
        await batcher.submit(ask("c"))
        assert len(transport.calls) == 2


async def test_a_batcher_opens_without_its_store_and_sends_when_it_is_there(own_redis):
    own_redis.kill()
    transport = model()
    async with batcher_on(own_redis.url, transport, tokens=10_000) as batcher:
        for number in (1, 2):
            with pytest.raises(mb.BudgetExceeded):
                await batcher.submit(ask("a"))
            figures = batcher.stats().budget
            assert (figures.spent_tokens, figures.left_tokens, figures.refused) == (0, 10_000, number)
        assert not transport.calls
        assert (batcher.stats().queued, batcher.stats().in_flight) == (0, 0)
        own_redis.start()
        reply = await batcher.submit(ask("a"))
        spent = reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert batcher.stats().budget.spent_tokens == total(own_redis)[1] == spent


async def test_a_cluster_counts_as_one_server_does(tmp_path):
    with redis_cluster(tmp_path, 3) as nodes:
        one, other = (batcher_on(node.url, tokens=300, per="tenant") for node in (nodes[0], nodes[-1]))
        async with one, other:
            for tenant in "abcdefgh":  # some on each node
                answered, _ = await ask_until_refused(one, tenant=tenant)
                assert answered >= 3
                assert (await ask_until_refused(other, tenant=tenant))[0] == 0


@pytest.mark.parametrize("how", ["caller", "closing"])
async def test_a_charge_that_arrives_after_its_caller_has_left_is_taken_back(own_redis, how):
    transport = model()
    async with batcher_on(own_redis.url, transport, tokens=10_000) as batcher:
        await batcher.submit(ask("a"))
        before = total(own_redis)[1]
        own_redis.pause()
        waiting = asyncio.ensure_future(batcher.submit(ask("b")))
        await until(lambda: batcher.stats().in_flight)
        await asyncio.sleep(0.1)  # for the command to be on its way
        if how == "caller":
            waiting.cancel()
            await asyncio.wait([waiting])
        else:
            closing = asyncio.ensure_future(batcher.aclose(grace=0.0))
            await asyncio.sleep(0.1)
        own_redis.resume()
        if how == "closing":
            await closing
            assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], mb.ShutDown)
        await until(lambda: not batcher.stats().in_flight)
        await until(lambda: total(own_redis)[1] == before)
        assert len(transport.calls) == 1


async def test_a_refusal_that_is_overtaken_by_a_correction_is_none():
    class Late(SharedCounters):
        """A store that answers late, of which a correction overtakes the answer to a charge."""

        delays = itertools.chain([0.0, 0.3], itertools.repeat(0.0))

        async def open(self):
            self.spent = 0

        async def add(self, counter, usd, tokens, most_usd=None, most_tokens=None):
            added = most_tokens is None or self.spent + tokens <= most_tokens
            self.spent += tokens if added else 0
            spent = self.spent
            await asyncio.sleep(next(self.delays))
            counter.usd, counter.tokens = 0.0, spent
            return added

        async def aclose(self):
            pass

    transport, answered = model(), asyncio.Event()
    answer = transport._usual

    async def wait(received):
        await answered.wait()
        return answer(received)

    transport._script = [wait]
    budget = mb.Budget(tokens=400)
    budget.shared = Late("redis://127.0.0.1:1", "batcher")
    async with batcher_for(transport, budget=budget, max_batch_size=1) as batcher:
        first = asyncio.ensure_future(batcher.submit(ask("a")))
        await until(lambda: transport.calls)
        second = asyncio.ensure_future(batcher.submit(ask("b")))
        await until(lambda: batcher.stats().in_flight == 2)
        await asyncio.sleep(0)
        answered.set()
        assert (await first).output == "A"
        assert (await second).output == "B"
        assert budget.shared.spent == batcher.stats().budget.spent_tokens < 100


async def test_a_store_that_fails_during_a_call_costs_no_answer(own_redis):
    transport = model()
    answer = transport._usual

    def lose(received):
        own_redis.kill()
        return answer(received)

    transport._script = [lose]
    async with batcher_on(own_redis.url, transport, tokens=10_000) as batcher:
        assert (await batcher.submit(ask("a"))).output == "A"
        assert batcher.stats().in_flight == 0


PROCESS = """
import asyncio, sys
import microbatch as mb
from microbatch.testing import ScriptedTransport

async def main(url):
    transport = ScriptedTransport(delay=0.002)
    transport.model = "m"
    budget = mb.Budget(usd=0.2, period="day", store=url)
    policy = mb.FlushPolicy(max_batch_size=1, max_concurrent_batches=4)
    prices = {"m": mb.Price(100.0, 100.0)}
    async with mb.Microbatcher(transport, budget=budget, policy=policy, prices=prices, tokens="bytes") as batcher:
        results = [result async for result in batcher.map([[{"role": "user", "content": str(n)}] for n in range(2_000)])]
        errors = {type(result.error).__name__ for result in results if result.error is not None}
        print(len(transport.calls), batcher.stats().cost_usd, *errors)

asyncio.run(main(sys.argv[1]))
"""


def test_processes_together_spend_the_budget_and_no_more(redis_server, tmp_path):
    program = tmp_path / "spend.py"
    program.write_text(textwrap.dedent(PROCESS))
    words = [sys.executable, str(program), redis_server.url]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [words[2:] for words in told] == [["BudgetExceeded"]] * 3
    together = sum(float(words[1]) for words in told)
    assert 0.15 < together <= 0.2
    assert total(redis_server)[0] == pytest.approx(together)
