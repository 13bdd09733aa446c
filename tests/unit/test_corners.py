"""Corners of the batcher's life that its usual days do not reach."""

import asyncio
import logging

import pytest
from helpers import ask, batcher_for

import microbatch as mb
from microbatch.testing import DeadlockError, ScriptedTransport, VirtualClockLoop, loop_factories

SECRET = "a customer's words"


@pytest.mark.promise(of="secrets")
async def test_no_repr_tells_a_word_of_anybody():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        options = {"headers": {"Authorization": "Bearer sk-canary"}}
        task = asyncio.ensure_future(batcher.submit(ask(SECRET, system=SECRET), **options))
        await asyncio.sleep(0.5)
        (work,) = batcher._engine.scheduler.under_way.values()
        ticket = work.tickets[0]
        call = transport.calls[0].call
        shown = [ticket, ticket.spec, call, batcher, mb.Request(ask(SECRET)), mb.Message("user", SECRET)]
        reply = await task
        shown += [reply, mb.Completion("stop", refusal=SECRET), mb.Result(0, None, reply)]
    for each in shown:
        assert SECRET.lower() not in repr(each).lower()
        assert "canary" not in repr(each)


async def test_once_all_are_answered_the_usage_is_awaited_for_two_seconds():

    class Slow(ScriptedTransport):
        async def send(self, call, on_text):
            received = [line.split("]")[0][1:] for line in call.messages[-1]["content"].splitlines()[1:]]
            on_text('{"results":[' + ",".join(f'{{"id":"{name}","answer":"ok"}}' for name in received))
            await asyncio.sleep(60)

    async with batcher_for(Slow()) as batcher:
        loop = asyncio.get_running_loop()
        replies = await asyncio.gather(*(batcher.submit(ask(f"{i}")) for i in range(3)))
        assert loop.time() == 0.0
        assert replies[0].usage.estimated
        settled = await replies[0].settled()
        assert loop.time() == 2.0
        assert settled.usage.estimated, "nobody ever reported it"
    stats = batcher.stats()
    assert stats.unreported_calls == 1
    assert (stats.cost_usd, stats.unbatched_cost_usd) == (None, None), "what was not told may have cost anything"


async def test_settled_returns_at_once_after_the_call_has_ended():
    async with batcher_for(ScriptedTransport()) as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(f"{i}")) for i in range(3)))
        assert (await replies[1].settled()) is replies[1]
        assert not replies[1].usage.estimated


async def test_replies_of_a_batch_that_is_closed_upon_still_settle():
    transport = ScriptedTransport(piece=60, interval=10.0)
    batcher = await batcher_for(transport).open()
    tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"))) for i in range(8)]
    reply = await tasks[0]
    await batcher.aclose(grace=0)
    await asyncio.wait(tasks)
    await asyncio.wait_for(reply.settled(), 1)
    assert {type(task.exception()) for task in tasks} == {type(None), mb.ShutDown}


async def test_max_prompt_tokens_bounds_the_whole_prompt():
    transport = ScriptedTransport()
    system = "s" * 500
    async with batcher_for(transport, max_prompt_tokens=1_600) as batcher:
        await asyncio.gather(*(batcher.submit(ask("x" * 100 + str(i), system)) for i in range(10)))
    for call in transport.calls:
        assert sum(len(message["content"]) for message in call.call.messages) <= 1_600
    assert len(transport.calls) > 1


async def test_a_huge_shared_message_leaves_no_room_within_max_prompt_tokens():
    transport = ScriptedTransport()
    async with batcher_for(transport, max_prompt_tokens=18_000) as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(f"{i}", "s" * 20_000)) for i in range(2)))
    assert {reply.route for reply in replies} == {"single"}


async def test_a_hundred_requests_too_long_to_combine_are_mentioned_once(caplog):
    async with batcher_for(ScriptedTransport(), max_batch_tokens=2_000) as batcher:
        with caplog.at_level(logging.WARNING, logger="microbatch"):
            await asyncio.gather(*(batcher.submit(ask("x" * 3_000)) for _ in range(250)))
    assert len(caplog.records) == 1
    assert "too long to share a prompt" in caplog.text


async def test_alone_requests_that_leave_are_forgotten():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, max_concurrent_batches=1) as batcher:
        tasks = [asyncio.ensure_future(batcher.submit(ask(f"{i}"), priority="high")) for i in range(200)]
        await asyncio.sleep(0.1)
        for task in tasks[1:-1]:
            task.cancel()
        await asyncio.sleep(0.1)
        (queue,) = batcher._engine.singles
        assert len(queue._waiting) <= 70
        await asyncio.wait(tasks)
        assert not len(batcher._engine.singles)
    assert [call.items[0][1] for call in transport.calls] == ["0", "199"]


async def test_closing_ends_those_who_wait_for_a_slot_to_forward():
    class Relaying(ScriptedTransport):
        def forward(self, *_):
            raise AssertionError("no slot was ever free")

    batcher = await batcher_for(Relaying(delay=100.0), max_concurrent_batches=1).open()
    blocker = asyncio.ensure_future(batcher.submit(ask("x")))
    await asyncio.sleep(0.1)

    async def relay():
        async with batcher.forward("GET", "models", {}):
            pass

    task = asyncio.ensure_future(relay())
    await asyncio.sleep(0.1)
    await batcher.aclose(grace=1)
    assert isinstance(task.exception(), mb.ShutDown)
    assert isinstance(blocker.exception(), mb.ShutDown)


async def test_closing_ends_an_async_source_of_map():
    closed = []

    async def source():
        try:
            while True:
                yield ask("x")
                await asyncio.sleep(1)
        finally:
            closed.append(True)

    batcher = await batcher_for(ScriptedTransport(delay=3), low_max_wait=0.1).open()
    seen = []

    async def consume():
        async for result in batcher.map(source()):
            seen.append(result)  # noqa: PERF401 what comes before the end counts

    task = asyncio.ensure_future(consume())
    await asyncio.sleep(5)
    await batcher.aclose()
    assert asyncio.get_running_loop().time() == 8.0, (
        "nothing is taken in once the door is shut, so nothing waits out the grace"
    )
    with pytest.raises(mb.BatcherClosed):
        await task
    assert seen
    assert all(result.reply is not None for result in seen)
    assert closed == [True]


async def test_a_wrapper_of_open_that_fails_leaves_the_transport_to_others():
    class Broken(ScriptedTransport):
        async def open(self):
            raise mb.ConfigError("no")

    transport = Broken()
    for _ in range(2):
        with pytest.raises(mb.ConfigError, match="no"):
            await batcher_for(transport).open()


async def test_a_user_function_counts_tokens():
    transport = ScriptedTransport()
    counted = []

    def count(text):
        counted.append(text)
        return len(text.split())

    async with mb.Microbatcher(transport, tokens=count) as batcher:
        await asyncio.gather(*(batcher.submit(ask(f"word {i}"), max_tokens=2) for i in range(4)))
    assert counted


@pytest.mark.promise(of="callbacks")
async def test_a_counter_that_fails_fails_only_its_own_request():
    def count(text):
        if "bad" in text:
            raise ValueError(text)
        return 1

    async with mb.Microbatcher(ScriptedTransport(), tokens=count) as batcher:
        good, bad = await asyncio.gather(
            batcher.submit(ask("fine")), batcher.submit(ask("bad")), return_exceptions=True
        )
    assert good.output == "FINE"
    assert isinstance(bad, mb.ConfigError)
    assert "bad" not in str(bad)


def test_a_test_that_waits_for_nothing_is_told_so(monkeypatch):
    monkeypatch.setattr("microbatch.testing.clock._PATIENCE", 0.01)
    loop = VirtualClockLoop()
    with pytest.raises(DeadlockError):
        loop.run_until_complete(loop.create_future())
    loop.close()
    assert loop_factories() == {"virtual": VirtualClockLoop}


@pytest.mark.promise(of="secrets")
def test_errors_keep_bodies_out_of_pickles():
    import pickle

    error = mb.BadRequest("endpoint answered 400", status=400, body=f"{SECRET} sk-canary123456", attempts=2)
    assert "canary" not in error.body
    twin = pickle.loads(pickle.dumps(error))
    assert (twin.status, twin.attempts, str(twin)) == (400, 2, "endpoint answered 400")
    assert twin.body == ""


async def test_what_never_opened_has_nothing_to_close():
    class Broken(ScriptedTransport):
        async def open(self):
            raise mb.ConfigError("no")

    batcher = batcher_for(Broken())
    await batcher.aclose()
    with pytest.raises(mb.ConfigError, match="no"):
        await batcher.open()
    await batcher.aclose()
    with pytest.raises(mb.BatcherClosed):
        await batcher.submit(ask("x"))
