"""llmock breaks its answers by script and judges what the client makes of it: a second opinion on retries and cut streams.

Its verdict ties attempts together by their whole body. What is asked again in other words, as the rest of a cut combined reply
is, counts for it as given up; the tests say so where that is right.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from helpers import ask
from llmock.simulation import MockResponseSettings

import microbatch as mb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmock.pytest_plugin import LLMock
    from llmock.testing import LLMockServer

pytestmark = pytest.mark.slow


QUICK = mb.RetryPolicy(base=0.03)
TEXTS = ["alpha", "bravo", "charlie", "delta"]


@pytest.fixture(autouse=True)
def repeat_the_question(llmock: LLMock, llmock_server: LLMockServer) -> Iterator[None]:
    """Single answers repeat the prompt, so that one can tell whose they are."""
    llmock_server.app.state.mock_response_settings = MockResponseSettings(response_style="echo")
    yield
    llmock.reset()


def batcher_for(stream: bool | None = None, limit: mb.RateLimit | None = None, **options: Any) -> mb.Microbatcher:
    # The fixture has set OPENAI_BASE_URL and OPENAI_API_KEY.
    chat = mb.OpenAIChat("m", stream=stream, **options)
    batcher = mb.Microbatcher(
        chat, retry=QUICK, rate_limit=limit, tokens="bytes", draw_ids=lambda number: ["bcdfg"] * number
    )
    # Full jitter may well wait shorter the second time, and the judge takes that for no back-off; so draw the longest waits.
    batcher._parts.sender._draw = lambda: 1.0
    return batcher


async def ask_one(batcher: mb.Microbatcher, text: str = "alpha", **options: Any) -> str:
    reply = await batcher.submit(ask(text), priority="high", **options)  # high goes alone, whoever else is about
    assert text in reply.output
    return reply.route


def combined_reply(texts: list[str]) -> str:
    elements = ",".join(
        f'{{"id":"{number}bcdfg","answer":"{text.upper()}"}}' for number, text in enumerate(texts, start=1)
    )
    return f'{{"results":[{elements}]}}'


async def ask_all(batcher: mb.Microbatcher) -> list[str]:
    return [reply.output for reply in await asyncio.gather(*(batcher.submit(ask(text)) for text in TEXTS))]


def verdict_codes(llmock: LLMock) -> list[str]:
    return [finding.code for finding in llmock.verdict().findings]


# Rate limits


async def test_a_rate_limit_is_waited_out_as_long_as_it_asks(llmock: LLMock) -> None:
    llmock.rate_limit(times=2, retry_after=0.2)
    async with batcher_for() as batcher:
        await ask_one(batcher)
    first, second, third = llmock.requests
    assert [first.status, second.status, third.status] == [429, 429, 200]
    # From start to start: when one ended, the judge may note late.
    assert min(second.started_at - first.started_at, third.started_at - second.started_at) >= 0.2
    llmock.assert_resilient(strict=True)


async def test_a_combined_call_is_repeated_word_for_word(llmock: LLMock) -> None:
    llmock.rate_limit(retry_after=0.05).reply(combined_reply(TEXTS))
    async with batcher_for() as batcher:
        assert await ask_all(batcher) == [text.upper() for text in TEXTS]
    assert len({request.fingerprint for request in llmock.requests}) == 1
    llmock.assert_resilient(strict=True)


async def test_callers_refused_by_a_token_quota_all_get_through(llmock: LLMock) -> None:
    # Two such calls are 60,000 tokens and some; what the second lacks comes in within half a second.
    llmock.limits(tpm=59_800)
    async with batcher_for() as batcher:
        await asyncio.gather(*(ask_one(batcher, text, max_tokens=30_000) for text in TEXTS[:2]))
    llmock.assert_resilient(strict=True)


async def test_callers_who_declare_the_quota_are_never_refused(llmock: LLMock) -> None:
    llmock.limits(rpm=600, tpm=60_000)
    async with batcher_for(limit=mb.RateLimit(rpm=600, tpm=60_000)) as batcher:
        # The burst of 2 % is 12 requests at once; the next 8 are paced to 10 a second.
        await asyncio.gather(*(ask_one(batcher, f"alpha {number}", max_tokens=8) for number in range(20)))
        assert batcher.stats().rate_limited == 0
    assert [request.status for request in llmock.requests] == [200] * 20
    llmock.assert_resilient(strict=True)


# Quota and other refusals that waiting does not heal


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 422])
async def test_what_no_retry_can_heal_is_not_retried(llmock: LLMock, status: int) -> None:
    llmock.fail(status)
    async with batcher_for() as batcher:
        with pytest.raises(mb.StatusError) as caught:
            await ask_one(batcher)
    assert (caught.value.status, caught.value.attempts) == (status, 1)
    assert len(llmock.requests) == 1
    llmock.assert_resilient(strict=True)


async def test_an_account_without_credit_is_not_asked_again(llmock: LLMock) -> None:
    llmock.fail(429, code="insufficient_quota", times=None)
    async with batcher_for() as batcher:
        for _ in range(2):
            with pytest.raises(mb.QuotaExhausted):
                await ask_one(batcher)
    # The judge knows no 429 that is final. That is the one thing it may hold against us.
    assert set(verdict_codes(llmock)) == {"gave_up"}
    assert all(len(call.attempts) == 1 for call in llmock.verdict().calls) or len(llmock.requests) == 1


async def test_a_refused_batch_is_halved_down_to_its_callers_own_requests_and_no_further(llmock: LLMock) -> None:
    llmock.fail(400, times=None)
    async with batcher_for() as batcher:
        refused = await asyncio.gather(*(batcher.submit(ask(text)) for text in TEXTS), return_exceptions=True)
    assert [type(error) for error in refused] == [mb.BadRequest] * 4
    assert len(llmock.requests) == 7
    llmock.assert_resilient(strict=True)


# Cut streams


@pytest.mark.parametrize("after_chunks", [0, 1, 4])
@pytest.mark.parametrize("fault", ["truncate", "disconnect"])
async def test_a_cut_stream_is_never_an_answer(llmock: LLMock, fault: str, after_chunks: int) -> None:
    getattr(llmock, fault)(after_chunks=after_chunks)
    async with batcher_for(stream=True) as batcher:
        await ask_one(batcher)
    assert len(llmock.requests) == 2
    llmock.assert_resilient(strict=True)


async def test_what_a_cut_combined_reply_has_lost_is_asked_again(llmock: LLMock) -> None:
    # The scripted reply comes as one piece for want of spaces, so split it where the third element begins.
    whole = combined_reply(TEXTS)
    at = whole.index('{"id":"3')
    llmock.truncate(after_chunks=2).reply(f"{whole[:at]} {whole[at:]}")
    async with batcher_for() as batcher:
        first, second, *rest = await ask_all(batcher)
    assert (first, second) == ("ALPHA", "BRAVO")
    # The judge's echo does not follow the combined format, so that the last two end as single calls.
    assert all(text in answer for text, answer in zip(TEXTS[2:], rest, strict=True))
    later = [str(request.body["messages"][-1]) for request in llmock.requests[1:]]
    assert not any("alpha" in question or "bravo" in question for question in later)
    assert verdict_codes(llmock) == [
        "truncated_stream_accepted"
    ]  # it does not know the rest when it is asked in other words


async def test_a_combined_reply_cut_before_its_first_answer_is_asked_for_again_as_it_is(llmock: LLMock) -> None:
    whole = combined_reply(TEXTS)
    at = whole.index("ALPHA")
    llmock.truncate(after_chunks=1).reply(f"{whole[:at]} {whole[at:]}").reply(whole)
    async with batcher_for() as batcher:
        assert await ask_all(batcher) == [text.upper() for text in TEXTS]
    assert len({request.fingerprint for request in llmock.requests}) == 1
    llmock.assert_resilient(strict=True)


async def test_a_text_with_a_broken_event_in_it_is_asked_for_again(llmock: LLMock) -> None:
    llmock.corrupt(after_chunks=3)
    async with batcher_for(stream=True) as batcher:
        await ask_one(batcher)
    # Not left to the judge: for it the second call is none's repetition if it comes before the first is seen to be given up.
    first, second = llmock.requests
    assert (first.fault, first.completed, second.completed) == ("stream:malformed@3", True, True)
    assert first.fingerprint == second.fingerprint


# Overload


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 504, 529])
async def test_a_failure_that_passes_is_outlasted(llmock: LLMock, status: int) -> None:
    llmock.fail(status, times=3, retry_after=0.05 if status > 502 else None)
    async with batcher_for() as batcher:
        await ask_one(batcher)
    assert len(llmock.requests) == 4
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize(
    ("status", "findings"),
    # After a 500 the response format goes one rung lower, since some servers fail at schemas that way. The call is another then.
    [(503, []), (500, ["gave_up"])],
)
async def test_a_combined_call_outlasts_a_failure(llmock: LLMock, status: int, findings: list[str]) -> None:
    llmock.fail(status, retry_after=0.05).reply(combined_reply(TEXTS))
    async with batcher_for() as batcher:
        assert await ask_all(batcher) == [text.upper() for text in TEXTS]
    assert verdict_codes(llmock) == findings
    assert len(llmock.requests) == 2


async def test_an_outage_ends_each_call_after_its_attempts(llmock: LLMock) -> None:
    llmock.fail(503, times=None, retry_after=0.05)
    async with batcher_for() as batcher:
        ended = await asyncio.gather(*(ask_one(batcher, text) for text in TEXTS[:3]), return_exceptions=True)
    assert [type(error) for error in ended] == [mb.ServerError] * 3
    assert [len(call.attempts) for call in llmock.verdict().calls] == [4, 4, 4]
    llmock.assert_resilient(strict=True)


# Slowness


async def test_patience_within_the_timeouts_costs_one_attempt(llmock: LLMock) -> None:
    llmock.delay(0.2).slow_first_token(0.2)
    async with batcher_for(stream=True) as batcher:
        await ask_one(batcher)
    assert len(llmock.requests) == 1
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize("fault", ["delay", "slow_first_token", "stall"])
async def test_a_silent_endpoint_is_hung_up_on_and_asked_again(llmock: LLMock, fault: str) -> None:
    {
        "delay": lambda: llmock.delay(3.0),
        "slow_first_token": lambda: llmock.slow_first_token(10.0),
        "stall": lambda: llmock.stall(after_chunks=3, seconds=10.0),
    }[fault]()
    # Long enough for a loaded machine to answer the second time.
    async with batcher_for(stream=True, timeout=3.0, idle_timeout=2.0) as batcher:
        await ask_one(batcher)
    async with asyncio.timeout(20):
        while len(llmock.requests) < 2:  # noqa: ASYNC110 it notes the first one when it has done with it
            await asyncio.sleep(0.05)
    assert len(llmock.requests) == 2
    llmock.assert_resilient(strict=True)
