"""Requests that nobody waits for are answered once, whatever happens to workers and endpoints; both backends, on real time."""

import asyncio
import contextlib
import itertools
import logging
from typing import Literal

import pytest
from helpers import ask, until

import microbatch as mb
from microbatch.spool.records import Stage
from microbatch.spool.worker import Worker
from microbatch.testing import ScriptedTransport

pytestmark = pytest.mark.slow


PATIENCE = 20.0


class Place:
    """Where a spool is; every object made of it is one more process, as it were."""

    def __init__(self, make):
        self._make = make
        self._opened = contextlib.AsyncExitStack()

    async def spool(self, **options):
        """An open spool."""
        made = self._make(**options)
        await made.open()
        self._opened.push_async_callback(made.aclose)
        return made

    def sender(self):
        """A batcher that hands requests over to the spool, and fetches answers."""
        return mb.Microbatcher(ScriptedTransport(), spool=self._make(), tokens="bytes")

    async def aclose(self):
        await self._opened.aclose()


@pytest.fixture(params=["sqlite", "redis"])
async def place(request, tmp_path, caplog):
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        found = Place(lambda **options: mb.RedisSpool(url, **options))
    else:
        found = Place(lambda **options: mb.SQLiteSpool(tmp_path / "s.sqlite", **options))
    yield found
    await found.aclose()


@contextlib.asynccontextmanager
async def worker_for(spool, transport, *, size=4, lease=5.0, until_empty=True, slots=2):
    """A worker, with a batcher for each stage, that runs as long as the block."""
    async with contextlib.AsyncExitStack() as stack:
        batchers = {}
        for stage, most in ((Stage.FULL, size), (Stage.HALF, size // 2), (Stage.ALONE, 1)):
            policy = mb.FlushPolicy(max_batch_size=most, low_max_wait=0.05, max_concurrent_batches=slots)
            batcher = mb.Microbatcher(transport, policy=policy, tokens="bytes", retry=mb.RetryPolicy(max_attempts=1))
            batchers[stage] = await stack.enter_async_context(batcher), 1 if stage is Stage.ALONE else most * slots
        yield Worker(spool, batchers, lease=lease, until_empty=until_empty)


async def drain(spool, transport, **options):
    async with worker_for(spool, transport, **options) as worker, asyncio.timeout(PATIENCE):
        await worker.run()
        return worker.done


async def test_what_was_enqueued_is_answered_in_full_batches_and_fetched_by_id(place):
    spool, transport = await place.spool(), ScriptedTransport()
    async with place.sender() as batcher:
        ids = [await batcher.enqueue(ask(f"q{number}"), id=f"id{number}") for number in range(10)]
        assert ids == [f"id{number}" for number in range(10)]
        done = await drain(spool, transport)
        assert (done.answered, done.failed, done.returned) == (10, 0, 0)
        for number in range(10):
            reply = await batcher.result(f"id{number}", timeout=0)
            assert (reply.output, reply.text) == (f"Q{number}", f"Q{number}")
            assert reply.route in ("batch", "single")
        assert (await batcher.result("id0")).output == "Q0"  # as often as one likes
    assert [len(call.items) for call in transport.calls] == [4, 4, 2]
    assert not transport.calls[-1].call.stream  # replies to bulk work are streamed until one has ended by itself


async def test_typed_answers_are_asked_for_by_schema_and_decoded_on_the_way_back(place):
    kind = Literal["red", "blue"]
    spool, transport = await place.spool(), ScriptedTransport(answer=lambda _: "red")
    async with place.sender() as batcher:
        await batcher.enqueue(ask("q"), id="a", output_type=kind, max_tokens=9, temperature=0, model="m")
        await drain(spool, transport)
        assert (await batcher.result("a", output_type=kind)).output == "red"
        assert (await batcher.result("a")).output == '"red"'
        with pytest.raises(mb.MalformedAnswer):
            await batcher.result("a", output_type=int)
    call = transport.calls[0].call
    assert (call.model, call.max_tokens, call.params["temperature"]) == ("m", 9, 0)
    assert "red" in str(call.schema)


async def test_a_result_is_waited_for(place):
    spool = await place.spool()
    async with place.sender() as batcher:
        await batcher.enqueue(ask("q"), id="a")
        with pytest.raises(mb.DeadlineExceeded):
            await batcher.result("a", timeout=0.1)
        waiting = asyncio.ensure_future(batcher.result("a", timeout=PATIENCE))
        await drain(spool, ScriptedTransport())
        assert (await waiting).output == "Q"


async def test_ids_are_the_callers_within_a_tenant_and_putting_twice_does_nothing(place):
    spool, transport = await place.spool(), ScriptedTransport()
    async with place.sender() as batcher:
        first = await asyncio.gather(*(batcher.enqueue(ask("q"), id="a") for _ in range(5)))
        assert set(first) == {"a"}
        with pytest.raises(mb.IdConflict):
            await batcher.enqueue(ask("other"), id="a")
        for options in ({"tenant": "t"}, {"tenant": ""}, {"tenant": "u", "model": "m"}):
            await batcher.enqueue(ask("other"), id="a", **options)
        await drain(spool, transport)
        assert (await batcher.result("a", timeout=0)).output == "Q"
        assert (await batcher.result("a", tenant="t", timeout=0)).output == "OTHER"
        with pytest.raises(mb.ConfigError, match="knows no request"):
            await batcher.result("b", tenant="t")
        with pytest.raises(mb.IdConflict):
            await batcher.enqueue(ask("other"), id="a")
        assert await batcher.enqueue(ask("q"), id="a") == "a"
        made_up = {await batcher.enqueue(ask("q")) for _ in range(3)}
        assert len(made_up) == 3
    combined = [{text for _, text in call.items} for call in transport.calls]
    assert len(combined) == 4  # tenants never travel together


async def test_stats_tell_what_is_in_the_spool(place):
    async with place.sender() as batcher:
        assert batcher.stats().spool_depth == 0
        for number in range(3):
            await batcher.enqueue(ask("q"), id=str(number))
        await asyncio.sleep(1.05)  # counts are shown for a second
        batcher.stats()
        await until(lambda: batcher.stats().spool_depth == 3)
        assert batcher.stats().spool_oldest > 0


async def test_a_poisoned_request_takes_no_innocent_along_and_ends_as_a_dead_letter(place):
    """The endpoint fails on whatever holds the poison, in a way that may be the request's fault but is not told so."""
    spool = await place.spool(max_alone=2)

    def model(call):
        if any("poison" in text for _, text in call.items):
            return mb.ServerError("boom", status=500)
        answers = [(name, text.upper()) for name, text in call.items]
        return call.reply(answers) if call.combined else answers[0][1]

    transport = ScriptedTransport(*[model] * 100)
    async with place.sender() as batcher:
        for number in range(8):
            await batcher.enqueue(ask("poison" if number == 2 else f"q{number}"), id=str(number))
        await drain(spool, transport)
        for number in set(range(8)) - {2}:
            assert (await batcher.result(str(number), timeout=0)).output == f"Q{number}"
        with pytest.raises(mb.RequestFailed, match="dead letter: ServerError: boom"):
            await batcher.result("2", timeout=0)
        poisoned = [len(call.items) for call in transport.calls if any("poison" in text for _, text in call.items)]
        assert poisoned == [4, 2, 1, 1]
        (letter,) = [letter async for letter in spool.dead_letters()]
        assert (letter.item.name.id, letter.deliveries) == ("2", 4)
        assert await spool.requeue() == 1
        await drain(spool, ScriptedTransport())
        assert (await batcher.result("2", timeout=0)).output == "POISON"


async def test_an_endpoint_that_is_down_costs_no_request_its_chances(place, monkeypatch, caplog):
    monkeypatch.setattr("microbatch.spool.worker.FIRST_PAUSE", 0.05)
    spool = await place.spool(max_alone=1)
    down = [
        mb.ConnectFailed("no route"),
        mb.ServerError("overloaded", status=503),
        mb.RateLimited("slow down", status=429),
    ]
    transport = ScriptedTransport(*(step for step in down for _ in range(2)))
    with caplog.at_level(logging.WARNING, logger="microbatch"):
        async with place.sender() as batcher:
            for number in range(8):
                await batcher.enqueue(ask(f"q{number}"), id=str(number))
            done = await drain(spool, transport, size=4, slots=2)
            outputs = [(await batcher.result(str(number), timeout=0)).output for number in range(8)]
    assert outputs == [f"Q{number}" for number in range(8)]
    assert (done.answered, done.failed) == (8, 0)
    assert done.returned >= 8
    assert {len(call.items) for call in transport.calls} == {4}
    assert any("pauses for" in record.message for record in caplog.records)


TROUBLE = {
    "500": mb.ServerError("boom", status=500),
    "501": mb.ServerError("boom", status=501),
    "524": mb.ServerError("boom", status=524),
    "408": mb.ServerError("boom", status=408),
    "404": mb.BadRequest("no such model", status=404),
    "silence": mb.TransportTimeout("no answer"),
    "cut": mb.TransportError("cut off"),
    "no model": mb.ConfigError("no model"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("before", [0, 2])
async def test_while_nothing_is_answered_no_request_is_to_blame(place, trouble, before, monkeypatch):
    monkeypatch.setattr("microbatch.spool.worker.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("microbatch.spool.worker.LONGEST_PAUSE", 0.1)
    spool = await place.spool(max_alone=1)
    calls = itertools.count()

    def model(call):
        if before <= next(calls) < before + 12:
            return TROUBLE[trouble].replica()
        answers = [(name, text.upper()) for name, text in call.items]
        return call.reply(answers) if call.combined else answers[0][1]

    async with place.sender() as batcher:
        for number in range(40):
            await batcher.enqueue(ask(f"q{number}"), id=str(number))
        done = await drain(spool, ScriptedTransport(*[model] * 200))
        assert done.answered == 40
        assert done.failed <= 2 * 4  # at the edge: those that were the last to fail, when all was well again
        assert (await spool.counts()).dead == 0
        assert [(await batcher.result(str(number), timeout=0)).output for number in range(40)] == [
            f"Q{number}" for number in range(40)
        ]


async def test_requests_that_fail_while_the_control_is_answered_are_to_blame_even_if_nothing_else_is_left(place):
    spool = await place.spool(max_alone=2)

    def model(call):
        if any("poison" in text for _, text in call.items):
            return mb.TransportTimeout("no answer")
        answers = [(name, text.upper()) for name, text in call.items]
        return call.reply(answers) if call.combined else answers[0][1]

    transport = ScriptedTransport(*[model] * 100)
    async with place.sender() as batcher:
        for number in range(4):
            await batcher.enqueue(ask(f"q{number}"), id=str(number))
        for number in range(4):
            await batcher.enqueue(ask(f"poison {number}"), id=f"bad{number}")
        await drain(spool, transport)
        assert {letter.item.name.id async for letter in spool.dead_letters()} == {f"bad{number}" for number in range(4)}
        assert (await spool.counts()).done == 4


async def test_a_worker_without_a_single_answer_blames_nobody_and_can_be_stopped(place, monkeypatch):
    monkeypatch.setattr("microbatch.spool.worker.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("microbatch.spool.worker.LONGEST_PAUSE", 0.1)
    spool = await place.spool(max_alone=1)
    transport = ScriptedTransport(*[mb.ServerError("boom", status=500) for _ in range(1_000)])
    async with place.sender() as batcher:
        for number in range(20):
            await batcher.enqueue(ask(f"q{number}"), id=str(number))
        async with worker_for(spool, transport) as worker:
            running = asyncio.ensure_future(worker.run())
            await until(lambda: len(transport.calls) > 20)
            worker.stop()
            async with asyncio.timeout(PATIENCE):
                await running
    assert (worker.done.answered, worker.done.failed) == (0, 0)
    assert (await spool.counts()).waiting == (20, 0, 0)


async def test_a_worker_whose_key_is_refused_from_the_start_ends(place):
    spool = await place.spool(max_alone=1)
    transport = ScriptedTransport(*[mb.AuthFailed("bad key", status=401) for _ in range(100)])
    async with place.sender() as batcher:
        for number in range(20):
            await batcher.enqueue(ask(f"q{number}"), id=str(number))
        async with worker_for(spool, transport, until_empty=False) as worker, asyncio.timeout(PATIENCE):
            await worker.run()
    assert worker.refused == "AuthFailed: bad key"
    assert (await spool.counts()).waiting == (20, 0, 0)


async def test_a_worker_that_needs_a_model_and_finds_none_ends_and_puts_all_back(place):
    spool, transport = await place.spool(max_alone=1), ScriptedTransport()
    async with place.sender() as batcher:
        for number in range(6):
            await batcher.enqueue(ask(f"q{number}"), id=str(number), model="m" if number < 3 else None)
        async with worker_for(spool, transport) as worker, asyncio.timeout(PATIENCE):
            worker._needs_model = True
            with pytest.raises(mb.ConfigError, match="--model"):
                await worker.run()
    counts = await spool.counts()
    assert (counts.leased, counts.dead) == (0, 0)
    assert (counts.done, counts.waiting[0]) == (3, 3)


async def test_a_worker_that_is_stopped_ends_what_it_holds_and_takes_no_more(place):
    spool = await place.spool()
    async with place.sender() as batcher:
        for number in range(40):
            await batcher.enqueue(ask(f"q{number}"), id=str(number))
        transport = ScriptedTransport(delay=0.1)
        async with worker_for(spool, transport, until_empty=False) as worker:
            running = asyncio.ensure_future(worker.run())
            await until(lambda: transport.calls)
            worker.stop()
            async with asyncio.timeout(PATIENCE):
                await running
        counts = await spool.counts()
        assert counts.leased == 0
        assert counts.done == worker.done.answered > 0
        assert counts.waiting == (40 - counts.done, 0, 0)


async def test_a_worker_that_is_cancelled_gives_back_what_it_holds_as_it_was(place):
    spool = await place.spool()
    async with place.sender() as batcher:
        for number in range(6):
            await batcher.enqueue(ask(f"q{number}"), id=str(number))
        transport = ScriptedTransport(delay=60.0)
        async with worker_for(spool, transport) as worker:
            running = asyncio.ensure_future(worker.run())
            await until(lambda: transport.calls)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert (await spool.counts()).waiting == (6, 0, 0)
        await drain(spool, ScriptedTransport())
        assert (await batcher.result("5", timeout=0)).output == "Q5"


async def test_leases_are_renewed_as_long_as_the_worker_lives(place):
    """Two workers, one of which takes longer than a lease: nothing is asked twice.

    The lease is much longer than a loaded machine keeps a renewal waiting; the answer takes longer still.
    """
    spool, other = await place.spool(), await place.spool()
    slow, quick = ScriptedTransport(delay=4.0), ScriptedTransport()
    async with place.sender() as batcher:
        for number in range(4):
            await batcher.enqueue(ask(f"q{number}"), id=str(number))
        async with worker_for(spool, slow, lease=3.0) as first:
            running = asyncio.ensure_future(first.run())
            await until(lambda: slow.calls)
            await drain(other, quick, lease=3.0)
            await running
    assert quick.calls == []
    assert first.done.answered == 4


async def test_what_a_dead_worker_held_is_answered_by_another_in_half_batches(place):
    spool, other = await place.spool(), await place.spool()
    async with place.sender() as batcher:
        for number in range(4):
            await batcher.enqueue(ask(f"q{number}"), id=str(number))
        assert len(await other.take(Stage.FULL, 10, lease=0.2)) == 4  # and never says a word again
        transport = ScriptedTransport()
        done = await drain(spool, transport)
        assert done.answered == 4
        assert [len(call.items) for call in transport.calls] == [2, 2]
        assert (await batcher.result("3", timeout=0)).output == "Q3"


async def test_a_batcher_without_a_spool_says_so():
    async with mb.Microbatcher(ScriptedTransport(), tokens="bytes") as batcher:
        with pytest.raises(mb.ConfigError, match="spool="):
            await batcher.enqueue(ask("q"))
        with pytest.raises(mb.ConfigError, match="spool="):
            await batcher.result("a")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"id": ""}, "id must not be empty"),
        ({"id": 7}, "id must be a string"),
        ({"tenant": 7}, "tenant must be a string"),
        ({"id": "\ud800"}, "UTF-8"),
    ],
)
async def test_misuse_is_told(tmp_path, options, words):
    spool = mb.SQLiteSpool(tmp_path / "s.sqlite")
    async with mb.Microbatcher(ScriptedTransport(), spool=spool, tokens="bytes") as batcher:
        with pytest.raises(mb.ConfigError, match=words):
            await batcher.enqueue(ask("q"), **options)
    with pytest.raises(mb.BatcherClosed):
        await batcher.enqueue(ask("q"))
    with pytest.raises(mb.ConfigError, match="spool must have"):
        mb.Microbatcher(ScriptedTransport(), spool="s.sqlite")
