"""A call lasts as long as a caller waits for it, and ends in nothing but its own outcome, its error or a cancellation."""

from __future__ import annotations

import asyncio

import pytest

import microbatch as mb
from microbatch.batching.call_state import USAGE_PATIENCE, CallState


def call(size=1):
    return CallState(size, "single", 0.0, None, None)


async def forever():
    await asyncio.get_running_loop().create_future()


async def test_a_call_that_nobody_waits_for_is_not_begun():
    state = call()
    state.abandoned()
    assert await state.while_awaited(forever) == (None, None)


async def test_the_result_or_the_error_of_a_step_is_returned():
    async def answer():
        return 1

    async def fail():
        raise mb.TransportError("x")

    assert await call().while_awaited(answer) == (1, None)
    result, error = await call().while_awaited(fail)
    assert result is None
    assert isinstance(error, mb.TransportError)


async def test_the_last_caller_that_leaves_ends_the_call_at_the_next_turn():
    state = call(2)
    sending = asyncio.ensure_future(state.while_awaited(forever))
    await asyncio.sleep(0)
    state.abandoned()
    await asyncio.sleep(1)
    assert not sending.done()
    now = asyncio.get_running_loop().time()
    state.abandoned()
    state.stop()  # no more than once
    assert await sending == (None, None)
    assert asyncio.get_running_loop().time() == now


async def test_the_end_of_a_reply_whose_answers_are_all_there_is_read_for_a_while():
    state = call()
    state.found = 1
    sending = asyncio.ensure_future(state.while_awaited(forever))
    await asyncio.sleep(0)
    now = asyncio.get_running_loop().time()
    state.abandoned()
    state.linger()  # does not prolong it
    assert await sending == (None, None)
    assert asyncio.get_running_loop().time() == now + USAGE_PATIENCE


async def test_a_cancellation_of_the_task_is_passed_on():
    sending = asyncio.ensure_future(call().while_awaited(forever))
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending


async def test_a_cancellation_within_the_transport_is_an_error_of_the_transport():
    async def cancelled():
        inner = asyncio.ensure_future(forever())
        asyncio.get_running_loop().call_soon(inner.cancel)
        await inner

    result, error = await call().while_awaited(cancelled)
    assert result is None
    assert isinstance(error, mb.TransportError)


async def test_a_timeout_of_another_scope_is_not_taken_for_the_end_of_the_call():
    async def late():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        await call().while_awaited(late)
