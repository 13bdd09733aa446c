"""Endpoints that follow OpenAI in their own way, over sockets: what callers get, and in how many calls."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Literal

import pytest
from helpers import ask
from odd_endpoint import Asked, answered, chunk, events, odd_endpoint, reply, whole

import microbatch as mb

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PATIENCE = 60.0
TEXTS = ("a", "b", "c", "d")
TYPED = Literal["A!", "B!", "C!", "D!"]
NO_SCHEMAS = {"error": {"message": "response_format json_schema is not supported"}}


def shout(text: str) -> str:
    return text.upper() + "!"


def answer(asked: Asked) -> Any:
    return answered(asked, asked.said(shout))


def batcher(url: str, **options: Any) -> mb.Microbatcher:
    return mb.Microbatcher(
        mb.OpenAIChat("m", base_url=url, api_key="k", **options),
        policy=mb.FlushPolicy(idle="wait", max_wait=0.05, max_batch_size=4),
        retry=mb.RetryPolicy(base=0.001, cap=0.002),
        tokens="bytes",
    )


async def outputs(batched: mb.Microbatcher, texts: Sequence[str] = TEXTS, **options: Any) -> list[Any]:
    async with asyncio.timeout(PATIENCE):
        replies = await asyncio.gather(*(batched.submit(ask(text, "Shout."), **options) for text in texts))
    return [each.output for each in replies]


def asks_for(asked: Asked, form: str) -> bool:
    return bool(asked.body.get("response_format", {}).get("type") == form)


REFUSED: dict[str, Callable[[Asked], bool]] = {
    "schemas": lambda asked: asks_for(asked, "json_schema"),
    "stream_options": lambda asked: "stream_options" in asked.body,
    "streams": lambda asked: asked.body["stream"] is True if "stream" in asked.body else False,
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_form_that_is_refused_without_a_word_is_found_out(name: str) -> None:
    """The first batch is halved down to its requests, which are answered; the second is asked in other forms, the third at once."""
    respond = REFUSED[name]
    async with (
        odd_endpoint(lambda asked: reply({"error": "no"}, 400) if respond(asked) else answer(asked)) as endpoint,
        batcher(endpoint.url) as batched,
    ):
        calls = []
        for _ in range(3):
            before = len(endpoint.asked)
            assert await outputs(batched) == ["A!", "B!", "C!", "D!"]
            calls.append(len(endpoint.asked) - before)
    assert calls[0] == 7
    assert calls[1] <= 5
    assert calls[2] == 1


async def test_a_schema_that_is_ignored_is_put_in_words_for_the_second_ask() -> None:
    """Anthropic's compatible endpoint ignores response_format; afterwards the words come with the first ask."""

    def respond(asked: Asked) -> Any:
        hinted = any("JSON Schema" in message["content"] for message in asked.body["messages"])
        return reply(whole('{"answer": "A!"}' if hinted else "It is **A!**."))

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        for calls in (2, 3):
            assert await outputs(batched, "a", output_type=TYPED) == ["A!"]
            assert len(endpoint.asked) == calls
    assert endpoint.asked[1].body["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize("system", [True, False])
async def test_a_hint_goes_where_the_template_takes_it(system: bool) -> None:
    """Into the system message that is first, or into the user's text where the template takes none."""

    def respond(asked: Asked) -> Any:
        if asks_for(asked, "json_schema"):
            return reply(NO_SCHEMAS, 400)
        if any(message["role"] == "system" for message in asked.body["messages"][int(system) :]):
            return reply({"object": "error", "message": "System message must be at the beginning."}, 400)
        return reply(whole('{"answer": "A!"}'))

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        for calls in (3, 4):
            messages = ask("a", "Shout.") if system else [{"role": "user", "content": "a"}]
            assert (await batched.submit(messages, output_type=TYPED, use_cache=False)).output == "A!"
            assert len(endpoint.asked) == calls
    sent = endpoint.asked[-1].body["messages"]
    assert [message["role"] for message in sent] == (["system", "user"] if system else ["user"])
    assert "JSON Schema" in json.dumps(sent[0])
    assert sent[-1]["content"].startswith("a")


async def test_a_connection_that_was_just_closed_costs_no_retry() -> None:
    """The endpoint closes kept connections while the next request is on its way."""
    calls = 0

    def respond(asked: Asked) -> Any:
        nonlocal calls
        calls += 1
        return ["reset"] if calls % 3 == 0 else answer(asked)

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        for _ in range(4):
            assert await outputs(batched, "a") == ["A!"]
        stats = batched.stats()
    assert calls > 4
    assert stats.retries == 0


async def test_a_relayed_request_goes_out_on_a_connection_of_calls() -> None:
    async with odd_endpoint(answer) as endpoint, batcher(endpoint.url) as batched:
        for _ in range(2):
            assert await outputs(batched, "a") == ["A!"]
            async with batched.forward("POST", "/chat/completions", {}, b'{"messages": []}') as forwarded:
                assert forwarded.status == 200


async def test_a_wait_in_the_body_is_kept() -> None:
    """As Gemini asks for one; `RetryPolicy` alone would be done in a few milliseconds."""
    loop, begun = asyncio.get_running_loop(), 0.0

    def respond(asked: Asked) -> Any:
        nonlocal begun
        begun = begun or loop.time()
        left = begun + 0.5 - loop.time()
        delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{left:.3f}s"}
        error = {
            "code": 429,
            "status": "RESOURCE_EXHAUSTED",
            "message": "You exceeded your quota, please check your plan and billing.",
        }
        return reply([{"error": {**error, "details": [delay]}}], 429) if left > 0 else answer(asked)

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        assert await outputs(batched, "a") == ["A!"]
    assert len(endpoint.asked) <= 3


async def test_tokens_that_are_reported_with_each_event_are_added_up() -> None:
    """cloudflare/ai#651: each event counts its own, and only the last one the prompt."""

    def respond(asked: Asked) -> Any:
        text = asked.said(shout)
        own = [chunk(letter, usage={"prompt_tokens": 0, "completion_tokens": 1}) for letter in text]
        last = chunk({}, "stop", usage={"prompt_tokens": "40", "completion_tokens": 0})
        return events(*own, last) if asked.body["stream"] else reply(whole(text))

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url, stream=True) as batched:
        reply_to = await batched.submit(ask("abcdef"))
    assert (reply_to.usage.prompt_tokens, reply_to.usage.completion_tokens) == (40, 7)
    assert len(endpoint.asked) == 1
