"""Streams of the client that differ from the documentation in form, as `test_odd_replies` has them for other replies."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from helpers import ask
from odd_endpoint import chunk, events, odd_endpoint, reply

import microbatch as mb
from microbatch.errors import MicrobatchError, RateLimited, TransportError
from microbatch.openai import AsyncOpenAI

pytestmark = pytest.mark.slow

PATIENCE = 30.0
SLOW = {"message": "slow down", "code": 429}


async def streamed(pieces: list[Any]) -> tuple[str, MicrobatchError | None]:
    """Return the text of a stream, and the error that ended it."""
    text, error = "", None
    async with (
        asyncio.timeout(PATIENCE),
        odd_endpoint(lambda _: pieces) as endpoint,
        mb.Microbatcher(mb.OpenAIChat("m", base_url=endpoint.url), tokens="bytes") as batcher,
        await AsyncOpenAI(batcher).chat.completions.create(model="m", messages=ask("x"), stream=True) as stream,
    ):
        try:
            async for part in stream:
                text += part.choices[0].delta.content or ""
        except MicrobatchError as raised:
            error = raised
    return text, error


def sent(raw: bytes) -> list[Any]:
    return reply(raw, kind="text/event-stream")


def lines(*data: Any) -> bytes:
    return b"\n\n".join(b"data: " + json.dumps(each).encode() for each in data)


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r", b"\n\n", b"\n\ndata: [DONE] ", b'\n\ndata: {"cut": '])
async def test_the_last_event_may_lack_its_blank_line(ending: bytes) -> None:
    assert await streamed(sent(lines(chunk("a"), chunk("b", "stop")) + ending)) == ("ab", None)


@pytest.mark.parametrize("alive", [b"ping", b"[PING]", b"keep-alive", b"", b"null", b": comment"])
async def test_a_keep_alive_is_no_chunk(alive: bytes) -> None:
    assert await streamed(events(chunk("a"), alive, chunk("b", "stop"))) == ("ab", None)


@pytest.mark.parametrize("failed", [{"error": SLOW}, [{"error": SLOW}], {"choices": [{"error": SLOW, "delta": {}}]}])
@pytest.mark.parametrize("cut", [False, True])
async def test_an_error_in_a_stream_is_raised_as_what_it_is(failed: Any, cut: bool) -> None:
    text, error = await streamed(sent(lines(chunk("a"), failed) + (b"" if cut else b"\n\n")))
    assert (text, type(error)) == ("a", RateLimited)


@pytest.mark.parametrize("ending", [b"", b"\n\n", b'\n\ndata: {"choices": [{"index": 0, "finish_reason": "st'])
async def test_a_stream_without_an_end_is_cut_off(ending: bytes) -> None:
    text, error = await streamed(sent(lines(chunk("a")) + ending))
    assert (text, type(error)) == ("a", TransportError)
