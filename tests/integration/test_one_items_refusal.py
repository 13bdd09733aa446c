"""A refusal that concerns one item costs that item alone, whatever its status; thoughts and reasoning in real calls."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Literal

import pytest
from helpers import ask
from odd_endpoint import Asked, answered, chunk, events, odd_endpoint, reply, whole

import microbatch as mb
from microbatch.errors import AuthFailed, BadRequest, Filtered, MalformedAnswer, MissingAnswer, TruncatedReply

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.slow

PATIENCE = 60.0
POISON = "poison"
TYPED = Literal["A!", "B!", "C!", "POISON!"]


def shout(text: str) -> str:
    return text.upper() + "!"


def batcher(url: str, **options: Any) -> mb.Microbatcher:
    return mb.Microbatcher(
        mb.OpenAIChat("m", base_url=url, api_key="k", **options),
        policy=mb.FlushPolicy(idle="wait", max_wait=0.05, max_batch_size=8),
        retry=mb.RetryPolicy(base=0.001, cap=0.002),
        tokens="bytes",
    )


async def outputs(batched: mb.Microbatcher, texts: Sequence[str], **options: Any) -> list[Any]:
    """Submit *texts* at once; return outputs and errors."""
    async with asyncio.timeout(PATIENCE):
        ended = await asyncio.gather(*(batched.submit(ask(text), **options) for text in texts), return_exceptions=True)
    return [each if isinstance(each, BaseException) else each.output for each in ended]


def poisoned(refusal: Callable[[Asked], Any]) -> Callable[[Asked], Any]:
    """An endpoint that answers, unless the poison is in what it is asked."""
    return lambda asked: refusal(asked) if POISON in asked.texts else answered(asked, asked.said(shout))


NO_CHOICES = {"id": "x", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 0}}
CONTENT: dict[str, Callable[[Asked], Any]] = {
    "xAI": lambda _: reply({"code": "no permission", "error": "Content violates usage guidelines."}, 403),
    "Cloudflare": lambda _: reply(
        {"errors": [{"code": 2016, "message": "Prompt blocked due to security configurations"}]}, 424
    ),
    "StepFun": lambda _: reply({"error": {"message": "blocked", "type": "censorship_blocked"}}, 451),
    "a proxy": lambda _: reply({"error": {"message": "Output blocked by content filtering policy"}}, 500),
    "Gemini, in words": lambda _: reply({"choices": [], "promptFeedback": {"blockReason": "SAFETY"}}),
    "Gemini, silently": lambda _: reply(NO_CHOICES),
    "Gemini, silently in a stream": lambda asked: events(NO_CHOICES) if asked.body["stream"] else reply(NO_CHOICES),
    "Zhipu": lambda asked: answered(asked, "", "sensitive"),
    "a refusal": lambda _: reply(whole(None, message={"refusal": "No."})),
}


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("options", [{}, {"output_type": TYPED}], ids=["text", "typed"])
async def test_one_items_content_is_refused_and_the_others_are_answered(name: str, options: dict[str, Any]) -> None:
    """By bisection, without a pause for anybody: the next batch goes out at once."""
    async with odd_endpoint(poisoned(CONTENT[name])) as endpoint, batcher(endpoint.url) as batched:
        for _ in range(4):  # more than it takes to open a breaker
            a, poison, b, c = await outputs(batched, ["a", POISON, "b", "c"], **options)
            assert (a, b, c) == ("A!", "B!", "C!")
            assert isinstance(poison, Filtered | mb.Refused)
        assert await outputs(batched, ["a"], **options) == ["A!"]
    # A halving costs five calls. Without choices, each of three is made twice before it is taken for a filter's doing.
    assert len(endpoint.asked) <= 4 * (8 if "silently" in name else 5) + 1


async def test_a_403_of_a_batch_under_a_key_that_works_is_about_what_was_asked() -> None:
    """Firewalls say no more than that; the first batch of a key tells nothing about it."""
    forbidden = poisoned(lambda _: reply(b"<html>Forbidden</html>", 403, "text/html"))
    async with odd_endpoint(forbidden) as endpoint, batcher(endpoint.url) as batched:
        assert [type(each) for each in await outputs(batched, ["a", POISON])] == [AuthFailed] * 2
        assert await outputs(batched, ["a", "b"]) == ["A!", "B!"]
        for _ in range(4):
            a, poison, b = await outputs(batched, ["a", POISON, "b"])
            assert (a, b, type(poison)) == ("A!", "B!", AuthFailed)
    assert len(endpoint.asked) <= 1 + 1 + 4 * 5


async def test_a_401_of_a_batch_concerns_everybody() -> None:
    """A key that has worked may have been withdrawn."""
    async with (
        odd_endpoint(poisoned(lambda _: reply({"error": "no"}, 401))) as endpoint,
        batcher(endpoint.url) as batched,
    ):
        assert await outputs(batched, ["a", "b"]) == ["A!", "B!"]
        assert [type(each) for each in await outputs(batched, ["a", POISON])] == [AuthFailed] * 2
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize("status", [429, 413])
async def test_a_request_that_is_too_large_is_split(status: int) -> None:
    """Waiting does not make it smaller; its lane sends smaller ones from then on."""
    said = "Request too large for m on tokens per min (TPM): Limit 30000, Requested 45400. The input or output tokens must be reduced."

    def respond(asked: Asked) -> Any:
        if len(asked.items) > 2:
            error = {"message": said, "type": "tokens", "code": "rate_limit_exceeded"}
            return reply({"error": error}, status, Retry_After="60", X_Should_Retry="true")
        return answered(asked, asked.said(shout))

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        for _ in range(2):
            assert await outputs(batched, ["a", "b", "c", "d"]) == ["A!", "B!", "C!", "D!"]
        assert batched.stats().rate_limited == 0
    assert len(endpoint.asked) <= 5
    async with (
        odd_endpoint(lambda _: reply({"error": {"message": said}}, status)) as endpoint,
        batcher(endpoint.url) as batched,
    ):
        assert [type(each) for each in await outputs(batched, ["a"])] == [BadRequest]
    assert len(endpoint.asked) == 1


# Thoughts


def draft(text: str) -> str:
    return f"draft of {text}"


THOUGHTS = {
    "with both marks": lambda asked: f"<think>Perhaps {asked.said(draft)}?</think>\n\n{asked.said(shout)}",
    "without the first mark": lambda asked: f"Perhaps {asked.said(draft)}?\n</think>\n\n{asked.said(shout)}",
    "Magistral": lambda asked: f"[THINK]{asked.said(draft)}[/THINK]{asked.said(shout)}",
    "gpt-oss": lambda asked: (
        f"<|channel|>analysis<|message|>{asked.said(draft)}<|end|><|channel|>final<|message|>{asked.said(shout)}"
    ),
    "twice": lambda asked: f"<think>{asked.said(draft)}</think><think>{asked.said(draft)}</think>{asked.said(shout)}",
}


@pytest.mark.parametrize("name", THOUGHTS)
@pytest.mark.parametrize("stream", [None, True, False])
async def test_no_draft_of_a_thought_is_an_answer(name: str, stream: bool | None) -> None:
    """Combined and alone, typed and text, streamed and whole, and in `map`."""
    respond = lambda asked: answered(asked, THOUGHTS[name](asked))  # noqa: E731
    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url, stream=stream) as batched:
        for options in ({}, {"output_type": TYPED}):
            assert await outputs(batched, ["a", "b", "c"], **options) == ["A!", "B!", "C!"]
            assert await outputs(batched, ["a"], **options) == ["A!"]
            results = [result async for result in batched.map([mb.Request(ask(text), **options) for text in "abc"])]
            assert {result.index: result.unwrap().output for result in results} == {0: "A!", 1: "B!", 2: "C!"}
    assert len(endpoint.asked) == 6


async def test_a_lone_text_can_keep_its_thought_and_the_body_always_does() -> None:
    """Whoever wants to see it."""
    thought = "<think>hm</think>\n\n"
    async with odd_endpoint(lambda asked: answered(asked, thought + asked.said(shout))) as endpoint:
        for thoughts, text in (("strip", "A!"), ("keep", thought + "A!")):
            async with batcher(endpoint.url, thoughts=thoughts) as batched:
                answer = await batched.submit(ask("a"))
                assert (answer.output, answer.text) == (text, text)
                assert answer.body is not None
                assert answer.body["choices"][0]["message"]["content"] == thought + "A!"
                assert await outputs(batched, ["a", "b"]) == ["A!", "B!"]
                alone = await batched.submit(ask("a"), params={"n": 2})
                assert alone.output == text


@pytest.mark.parametrize("thoughts", ["drop", "", None, 1, ["strip"]])
def test_the_setting_is_one_of_two_words(thoughts: Any) -> None:
    """Said with the setting's name."""
    with pytest.raises(mb.ConfigError, match="thoughts"):
        mb.OpenAIChat("m", api_key="k", thoughts=thoughts)


async def test_a_lane_whose_drafts_went_out_hands_out_nothing_early_any_more() -> None:
    """A thought without its first mark that begins with its draft is known only afterwards."""
    respond = lambda asked: answered(asked, f"{asked.said(draft)} no.\n</think>\n{asked.said(shout)}")  # noqa: E731
    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        await outputs(batched, ["a", "b"])
        for _ in range(3):
            assert await outputs(batched, ["a", "b", "c"]) == ["A!", "B!", "C!"]
        # Calls that are not streamed have nothing to hand out early.
        results = [result async for result in batched.map([mb.Request(ask(text, "Another lane.")) for text in "abc"])]
        assert sorted(result.unwrap().output for result in results) == ["A!", "B!", "C!"]
    assert len(endpoint.asked) == 5


# Reasoning beside the text


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
async def test_an_answer_that_went_into_the_reasoning_is_said_to_be_there_in_few_calls(field: str) -> None:
    """A reasoning parser that takes all for thought, as vLLM's did."""

    def respond(asked: Asked) -> Any:
        said = {field: asked.said(shout), "content": None}
        if asked.body["stream"]:
            return events(chunk(said), chunk({}, "stop"))
        return reply(whole(None, message=said))

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        for error in await outputs(batched, list("abcdefgh")):
            assert isinstance(error, MalformedAnswer | MissingAnswer)
            assert "reasoning" in str(error)
        assert len(endpoint.asked) <= 3
        (error,) = await outputs(batched, ["a"])
        assert "reasoning" in str(error)
    assert len(endpoint.asked) <= 5


async def test_reasoning_alone_happens_once_and_the_others_are_answered() -> None:
    """One such reply condemns nobody."""

    def respond(asked: Asked) -> Any:
        if not asked.number:
            return events(chunk({"reasoning_content": "hm"}), chunk({}, "stop"))
        return answered(asked, asked.said(shout))

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        assert await outputs(batched, ["a", "b", "c", "d"]) == ["A!", "B!", "C!", "D!"]


@pytest.mark.parametrize("shown", ["usage", "field", "thought", None])
async def test_max_tokens_that_reasoning_has_used_up_are_named(shown: str | None) -> None:
    """As what it is, for texts and for typed answers."""

    def respond(asked: Asked) -> Any:
        text = "<think>Well, I" if shown == "thought" else ""
        usage = {"prompt_tokens": 9, "completion_tokens": 50, "completion_tokens_details": {"reasoning_tokens": 50}}
        more = {"usage": usage} if shown == "usage" else {}
        message = {"reasoning_content": "hm"} if shown == "field" else {}
        if asked.body["stream"]:
            return events(chunk({"content": text, **message}), chunk({}, "length", **more))
        return reply(whole(text, "length", message=message, **more))

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        for options in ({}, {"output_type": TYPED}):
            for texts in (["a"], ["a", "b", "c", "d"]):
                for error in await outputs(batched, texts, max_tokens=50, **options):
                    assert isinstance(error, TruncatedReply)
                    assert ("reasoning" in str(error)) == (shown is not None)
                    assert "max_tokens" in str(error)
    assert len(endpoint.asked) <= 2 * (1 + 7)


async def test_reasoning_tokens_reach_the_callers_and_none_is_lost() -> None:
    """They are divided like all others, and what belongs to nobody is unclaimed."""
    usage = {"prompt_tokens": 100, "completion_tokens": 70, "completion_tokens_details": {"reasoning_tokens": 61}}

    def respond(asked: Asked) -> Any:
        return events(chunk(asked.said(shout)), chunk({}, "stop"), {"choices": [], "usage": usage})

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url, stream=True) as batched:
        replies = await asyncio.gather(*(batched.submit(ask(text)) for text in "abc"))
        shares = [(await each.settled()).usage for each in replies]
        assert sum(shares, batched.stats().unclaimed) == mb.Usage(100, 70, reasoning_tokens=61)
        assert all(share.reasoning_tokens for share in shares)
