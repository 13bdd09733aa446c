"""Bulk work: full batches, bounded memory, no hangs."""

import asyncio

import pytest
from helpers import ask, batcher_for

import microbatch as mb
from microbatch.testing import ScriptedTransport


async def collect(iterator):
    return [result async for result in iterator]


async def test_map_answers_everything_in_full_batches():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport) as batcher:
        results = await collect(batcher.map(ask(f"i{n}") for n in range(100)))
    assert sorted(result.index for result in results) == list(range(100))
    assert all(result.reply.output == f"I{result.index}" for result in results)
    assert sorted((len(call.items) for call in transport.calls), reverse=True) == [16] * 6 + [4]
    # Two batches at first, because the lane is on trial; then the other full ones, and the rest with them, as nothing more can come.
    assert asyncio.get_running_loop().time() == 1.0 + 1.0


async def test_ordered_results_come_in_the_order_of_the_source():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        results = await collect(batcher.map((ask(f"{n % 3}", system=f"{n % 7}") for n in range(50)), ordered=True))
    assert [result.index for result in results] == list(range(50))


async def test_requests_carry_their_options_and_names():
    requests = [mb.Request(ask("a"), id="first"), mb.Request(ask("b"), id="second", max_tokens=5)]
    async with batcher_for(ScriptedTransport()) as batcher:
        results = await collect(batcher.map(requests, ordered=True))
    assert [(result.id, result.unwrap().output) for result in results] == [("first", "A"), ("second", "B")]


async def test_item_errors_are_in_their_results():
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        results = await collect(batcher.map([ask("fine"), [], mb.Request(ask("x"), max_tokens=-1)], ordered=True))
    assert [type(result.error) for result in results] == [type(None), mb.ConfigError, mb.ConfigError]
    with pytest.raises(mb.ConfigError):
        results[1].unwrap()


async def test_a_failed_call_is_in_the_results_of_its_items():
    transport = ScriptedTransport(mb.AuthFailed("no", status=401))
    async with batcher_for(transport) as batcher:
        results = await collect(batcher.map(ask(f"{n}") for n in range(4)))
    assert {type(result.error) for result in results} == {mb.AuthFailed}


async def test_more_lanes_than_pending_requests_do_not_hang():
    transport = ScriptedTransport(delay=0.1)
    async with batcher_for(transport) as batcher:
        results = await collect(batcher.map((ask("x", system=f"lane {n}") for n in range(5_000)), max_pending=3))
    assert len(results) == 5_000
    assert all(result.reply is not None for result in results)


async def test_max_pending_bounds_what_is_taken():
    taken = 0

    def source():
        nonlocal taken
        for n in range(200):
            taken += 1
            yield ask(f"{n}")

    ahead = []
    async with batcher_for(ScriptedTransport(delay=1.0)) as batcher:
        seen = 0
        async for _ in batcher.map(source(), max_pending=10):
            seen += 1
            ahead.append(taken - seen)
    assert seen == 200
    assert max(ahead) <= 10


async def test_an_async_source_that_waits_for_results_does_not_hang():
    answered = asyncio.Event()

    async def source():
        for n in range(5):
            yield ask(f"{n}")
            if n:
                await answered.wait()
                answered.clear()

    async with batcher_for(ScriptedTransport(), low_max_wait=2.0) as batcher:
        outputs = []
        async for result in batcher.map(source()):
            outputs.append(result.reply.output)
            answered.set()
    assert sorted(outputs) == ["0", "1", "2", "3", "4"]


async def test_an_error_of_the_source_comes_once_after_the_results():
    def source():
        yield ask("a")
        yield ask("b")
        raise OSError("disk")

    async def slow():
        for messages in source():
            yield messages

    for make in (source, slow):
        outputs = []
        async with batcher_for(ScriptedTransport()) as batcher:
            with pytest.raises(OSError, match="disk"):
                async for result in batcher.map(make()):
                    outputs.append(result.reply.output)  # noqa: PERF401 what comes before the error counts
        assert outputs == ["A", "B"]


async def test_leaving_early_cancels_what_is_pending():
    transport = ScriptedTransport(delay=10.0)
    async with batcher_for(transport) as batcher:
        iterator = batcher.map((ask(f"{n}", system=f"{n % 2}") for n in range(64)), max_pending=40)
        async for _ in iterator:
            break
        await iterator.aclose()
        await asyncio.sleep(0)
        stats = batcher.stats()
        assert stats.queued == 0
        assert stats.cancelled == stats.items - stats.answered
    assert not batcher._engine.scheduler.watchers


async def test_map_shares_lanes_with_submit():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, idle="wait", max_wait=0.5) as batcher:

        async def forever():
            for n in range(3):
                yield ask(f"{n}")
            await asyncio.sleep(1.0)

        bulk = asyncio.ensure_future(collect(batcher.map(forever())))
        await asyncio.sleep(0.1)
        reply = await batcher.submit(ask("single"))
        await bulk
    assert reply.batch_size == 4
    assert transport.calls[0].started == pytest.approx(0.6)


async def test_map_waits_for_room_whatever_when_full_says():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, max_queued=4, when_full="reject") as batcher:
        results = await collect(batcher.map(ask(f"{n}") for n in range(20)))
    assert all(result.reply is not None for result in results)
    assert len(results) == 20


async def test_map_gets_its_turn_beside_others_who_fill_the_batcher():
    transport = ScriptedTransport(delay=1.0)
    async with batcher_for(transport, max_queued=2) as batcher:
        submits = [asyncio.ensure_future(batcher.submit(ask(f"s{n}"))) for n in range(6)]
        await asyncio.sleep(0)
        results = await collect(batcher.map(ask(f"m{n}") for n in range(4)))
        await asyncio.gather(*submits)
    assert len(results) == 4


async def test_closing_in_mid_map_ends_it_with_a_typed_error():
    transport = ScriptedTransport(delay=1.0)
    batcher = await batcher_for(transport).open()

    async def consume():
        return [result async for result in batcher.map((ask(f"{n}") for n in range(1_000)), max_pending=32)]

    task = asyncio.ensure_future(consume())
    await asyncio.sleep(0.5)
    await batcher.aclose()
    with pytest.raises(mb.BatcherClosed):
        await task


async def test_a_source_that_cannot_be_iterated_is_refused():
    async with batcher_for(ScriptedTransport()) as batcher:
        with pytest.raises(mb.ConfigError, match="iterable"):
            batcher.map(3)
        with pytest.raises(mb.ConfigError, match="max_pending"):
            batcher.map([], max_pending=0)


async def test_an_async_source_gets_its_turn_when_others_fill_the_batcher():
    transport = ScriptedTransport(delay=1.0)

    async def source():
        for n in range(4):
            yield ask(f"m{n}")

    async with batcher_for(transport, max_queued=2) as batcher:
        submits = [asyncio.ensure_future(batcher.submit(ask(f"s{n}"))) for n in range(6)]
        await asyncio.sleep(0)
        results = await collect(batcher.map(source()))
        await asyncio.gather(*submits)
    assert sorted(result.reply.output for result in results) == ["M0", "M1", "M2", "M3"]


async def test_places_freed_by_cancelled_callers_reach_a_waiting_map():
    transport = ScriptedTransport(delay=1.0)

    async def source():
        for n in range(3):
            yield ask(f"m{n}")

    for make in (source, lambda: [ask(f"m{n}") for n in range(3)]):
        async with batcher_for(transport, max_queued=2, idle="wait", max_wait=1_000) as batcher:
            submits = [asyncio.ensure_future(batcher.submit(ask(f"s{n}"))) for n in range(2)]
            await asyncio.sleep(0)
            bulk = asyncio.ensure_future(collect(batcher.map(make())))
            await asyncio.sleep(5)
            for task in submits:
                task.cancel()
            assert len(await bulk) == 3
