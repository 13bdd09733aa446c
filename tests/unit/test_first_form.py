"""The wait of concurrent calls for the first one to an endpoint, on virtual time."""

from __future__ import annotations

import asyncio

from helpers import chat_call, now

from microbatch.transports.first_form import PATIENCE, FirstForm


async def waits(first, call):
    begun = now()
    await first.wait(call)
    return now() - begun


async def test_the_first_call_waits_for_nothing_at_any_of_its_attempts():
    first, call = FirstForm(), chat_call()
    assert [await waits(first, call) for _ in range(3)] == [0, 0, 0]
    assert not first.over


async def test_the_others_wait_until_it_has_ended():
    first, calls = FirstForm(), [chat_call() for _ in range(4)]
    await first.wait(calls[0])
    others = [asyncio.ensure_future(waits(first, call)) for call in calls[1:]]
    await asyncio.sleep(0.03)
    first.end(calls[1])  # not the first one
    assert not first.over
    first.end(calls[0])
    assert [await other for other in others] == [0.03] * 3
    assert first.over


async def test_none_waits_longer_than_the_patience_since_the_first_call_began():
    first, calls = FirstForm(), [chat_call() for _ in range(3)]
    await first.wait(calls[0])
    await asyncio.sleep(PATIENCE / 2)
    assert await waits(first, calls[1]) == PATIENCE / 2
    assert first.over
    late = FirstForm()
    await late.wait(calls[0])
    await asyncio.sleep(2 * PATIENCE)
    assert await waits(late, calls[2]) == 0
    assert late.over


async def test_a_first_call_that_is_gone_holds_the_others_no_longer_than_that():
    first = FirstForm()
    await first.wait(chat_call())
    assert await waits(first, chat_call()) <= PATIENCE
    assert first.over
