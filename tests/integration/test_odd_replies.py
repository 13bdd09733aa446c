"""Replies that differ from the documentation in form are read for what they say; what is no answer is asked for again."""

from __future__ import annotations

import asyncio
import gzip
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import pytest
from helpers import ask
from odd_endpoint import Asked, answered, chunk, events, odd_endpoint, reply, streamed, whole

import microbatch as mb
from microbatch.errors import ConnectFailed, ServerError, TransportTimeout, TruncatedReply
from microbatch.protocols import ChatCall, Completion

pytestmark = pytest.mark.slow  # real sockets and real time

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 30.0
FOR_EVER = 60.0  # longer than a test waits
LONG_FACE = "\U0001f600 it is f\u00fcr Sie"


async def send(respond: Callable[[Asked], Any], *, stream: bool = True, **options: Any) -> tuple[str, Completion]:
    """Return the text of one attempt, and how it ended."""
    pieces: list[str] = []
    async with odd_endpoint(respond) as endpoint:
        chat = mb.OpenAIChat("m", base_url=endpoint.url, **options)
        try:
            async with asyncio.timeout(PATIENCE):
                completion = await chat.send(
                    ChatCall(messages=[{"role": "user", "content": "x"}], stream=stream), pieces.append
                )
        finally:
            await chat.aclose()
    return "".join(pieces), completion


def batcher(url: str, **options: Any) -> mb.Microbatcher:
    """A batcher that combines four requests and asks again quickly."""
    return mb.Microbatcher(
        mb.OpenAIChat("m", base_url=url, **options),
        policy=mb.FlushPolicy(idle="wait", max_wait=0.05, max_batch_size=4),
        retry=mb.RetryPolicy(base=0.001, cap=0.002),
        tokens="bytes",
    )


async def batch_of_four(batched: mb.Microbatcher, **options: Any) -> list[Any]:
    """Submit four texts at once; return outputs and errors."""
    async with asyncio.timeout(PATIENCE):
        replies = await asyncio.gather(
            *(batched.submit(ask(f"t{number}"), **options) for number in range(4)), return_exceptions=True
        )
    return [each if isinstance(each, BaseException) else each.output for each in replies]


FOUR = ["T0!", "T1!", "T2!", "T3!"]


def shout(text: str) -> str:
    return text.upper() + "!"


# Decoding


@pytest.mark.parametrize(
    ("deltas", "text"),
    [
        (["v", 1, ".", 50, "x"], "v1.50x"),
        (["is ", True, " or ", False], "is true or false"),
        ([{"content": b"0.50"}], "0.50"),
        ([{"content": [{"type": "text", "text": "a"}, "b", {"text": 7}]}], "ab7"),
        ([{"content": "a"}, None, {"content": None}, {"role": None}], "a"),
        (["half \ud83d", "\ude00!"], "half \U0001f600!"),
        (["half \ud83d", "", {"role": "assistant"}, "\ude00!"], "half \U0001f600!"),
        (["lost \ud83d", "half"], "lost \ufffdhalf"),
        (["lost \ude00 half"], "lost \ufffd half"),
        (["end \ud83d"], "end \ufffd"),
    ],
)
@pytest.mark.parametrize("done", [True, False])
async def test_text_in_an_odd_form_is_read_as_what_it_stands_for(deltas: list[Any], text: str, done: bool) -> None:
    """A proxy's JSON library turns text that looks like a number into one, and cuts characters in two."""
    made: list[Any] = []
    for each in deltas:
        if isinstance(each, dict) and isinstance(each.get("content"), bytes):
            made.append(b'{"choices":[{"delta":{"content":%b}}]}' % each["content"])
        else:
            made.append(chunk(each if isinstance(each, dict | str) or each is None else {"content": each}))
    got, completion = await send(lambda _: events(*made, chunk({}, "stop"), done=done))
    assert (got, completion.finish_reason, completion.damaged) == (text, "stop", False)


@pytest.mark.parametrize("index", [0.0, "0", None, "", "none"])
@pytest.mark.parametrize("stream", [True, False])
async def test_the_only_choice_may_have_any_index(index: Any, stream: bool) -> None:
    """Its index is a text, a float or nothing at all in some proxies."""

    def respond(_: Asked) -> Any:
        event, body = chunk("hi", "stop"), whole("hi")
        event["choices"][0]["index"] = body["choices"][0]["index"] = index
        return events(event) if stream else reply(body)

    assert (await send(respond, stream=stream))[0] == "hi"


async def test_further_choices_are_no_text_however_their_index_is_written() -> None:
    """Only the first choice is the answer."""
    other = {"delta": {"content": "other"}, "index": "1"}
    event = chunk("hi", "stop")
    event["choices"].append(other)
    assert (await send(lambda _: events(event)))[0] == "hi"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"choices":[{"message":{"content":"hi"},"finish_reason":"stop","logprob":NaN}],"x":-Infinity}',
        b'{"choices":[{"message":{"content":"hi","refusal":7,"tool_calls":7},"finish_reason":"stop"}],"usage":"?"}',
        b'\xef\xbb\xbf{"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}],"note":"a\tb\xff"}',
        b'{"choices":[{"message":{"content":"hi"},"finish_reason":"stop"}],"note":"\\ud83d"}',
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_oddities_beside_the_text_are_no_harm(raw: bytes, stream: bool) -> None:
    """NaN, control characters, broken UTF-8 and wrong types in fields that nobody uses."""
    text, completion = await send(lambda _: events(raw) if stream else reply(raw), stream=stream)
    assert (text, completion.finish_reason) == ("hi", "stop")
    if not stream:
        assert completion.body is not None
        assert completion.body["choices"][0]["message"]["content"] == "hi"


UNREADABLE = [
    b'{"choices":[{"delta":{"cont',
    b"7",
    b"\xff\xfe",
    b'{"choices":"x"}',
    b'{"choices":[{"delta":{"content":{}}}]}',
    b"oops",
]


@pytest.mark.parametrize("garbage", UNREADABLE)
async def test_an_event_that_cannot_be_read_leaves_a_mark_in_the_text(garbage: bytes) -> None:
    """What was in it is not known, so the text around it must not be taken for whole."""
    text, completion = await send(lambda _: events(chunk("a"), garbage, chunk("b"), chunk({}, "stop")))
    assert (text, completion.finish_reason, completion.damaged) == ("a\0b", "stop", True)
    _, completion = await send(lambda _: events(chunk("a"), garbage))
    assert completion.finish_reason is None  # [DONE] alone does not make it whole


@pytest.mark.parametrize("alive", [b"ping", b"[PING]", b"keep-alive", b"", b'{"type":"ping"}', b": comment"])
async def test_a_keep_alive_is_no_damage(alive: bytes) -> None:
    """Proxies keep connections open in several ways."""
    text, completion = await send(lambda _: events(chunk("a"), alive, chunk("b"), alive, chunk({}, "stop")))
    assert (text, completion.damaged) == ("ab", False)


@pytest.mark.parametrize("garbage", UNREADABLE)
async def test_an_unreadable_event_costs_the_answers_that_it_held_and_no_more(garbage: bytes) -> None:
    """The others stand, and nothing is drawn from the retry budget."""

    def respond(asked: Asked) -> Any:
        text = asked.said(shout)
        if asked.number:
            return answered(asked, text)
        pieces: list[Any] = [chunk(text[at : at + 5]) for at in range(0, len(text), 5)]
        pieces[pieces.index(chunk(text[45:50]))] = garbage  # within the second answer or the third
        return events(*pieces, chunk({}, "stop"))

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        assert await batch_of_four(batched) == FOUR
        assert batched.stats().retries == 0
    assert len(endpoint.asked) <= 3
    assert endpoint.asked[0].items


async def test_a_lone_text_with_a_gap_is_asked_for_again() -> None:
    """No caller gets a text of which a part is missing."""

    def respond(asked: Asked) -> Any:
        return events(chunk("wh"), b"{oops", chunk("ole"), chunk({}, "stop")) if not asked.number else streamed("whole")

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url, stream=True) as batched:
        assert (await batched.submit(ask("x"))).output == "whole"
    assert len(endpoint.asked) == 2


# Content types


@pytest.mark.parametrize(
    "kind", ["application/json", "text/plain", "application/octet-stream", "", "text/event-stream"]
)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("sent", ["events", "json"])
async def test_the_first_byte_tells_events_from_json(kind: str, stream: bool, sent: str) -> None:
    """The content type is often wrong; the body is not."""

    def respond(_: Asked) -> Any:
        if sent == "json":
            return reply(b"\n \n" + reply(whole(LONG_FACE))[0].split(b"\r\n\r\n", 1)[1], kind=kind)  # type: ignore[union-attr]
        return events(b": hello", chunk(LONG_FACE), chunk({}, "stop"), kind=kind or "x/y")

    text, completion = await send(respond, stream=stream)
    assert (text, completion.finish_reason) == (LONG_FACE, "stop")


@pytest.mark.parametrize("size", [1, 3])
async def test_the_form_is_told_from_any_pieces(size: int) -> None:
    """The first piece may hold no more than a blank line or a part of a byte order mark."""
    raw = b'\xef\xbb\xbf\r\n\r\nevent: message\r\ndata: {"choices":[{"delta":{"content":"hi"},"finish_reason":"stop"}]}\r\n\r\n'
    head = b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw)
    pieces = [part for at in range(0, len(raw), size) for part in (raw[at : at + size], 0.001)]
    assert (await send(lambda _: [head, *pieces], stream=False))[0] == "hi"


async def test_whether_to_stream_is_said_in_words() -> None:
    """Some proxies stream unless they are told not to; one that refuses the field is not told again."""

    def respond(asked: Asked) -> Any:
        if "stream" in asked.body:
            said = {"message": "Unknown parameter: 'stream'", "param": "stream", "code": "unknown_parameter"}
            return reply({"error": said}, 400)
        return reply(whole("hi"))

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        for _ in range(2):
            assert (await batched.submit(ask("x"))).output == "hi"
    assert [asked.body.get("stream") for asked in endpoint.asked] == [False, None, None]


@pytest.mark.parametrize(
    "message",
    [
        "parameter.enable_thinking must be set to false for non-streaming calls",
        "This model only support stream mode, please enable the stream parameter to access the model.",
        "Stream must be set to true",
        "non-streaming is not supported by this model",
        "Only stream=true is supported",
        "Streaming is required for this model",
    ],
)
async def test_that_there_are_streams_only_is_learned(message: str) -> None:
    """One refusal is paid for; calls whose reply cannot be streamed are told what the endpoint said."""

    def respond(asked: Asked) -> Any:
        return streamed("hi") if asked.body.get("stream") else reply({"error": {"message": message}}, 400)

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        for _ in range(3):
            assert (await batched.submit(ask("x"))).output == "hi"
        assert [asked.body["stream"] for asked in endpoint.asked] == [False, True, True, True]
        with pytest.raises(mb.errors.BadRequest):
            await batched.submit(ask("x"), params={"n": 2})


# A 200 that is no answer

NO_ANSWERS: dict[str, Any] = {
    "blank lines": b"\n      \n" * 30,
    "nothing": b"",
    "half of it": b'{"choices":[{"message":{"content":"h',
    "a login page": b"<html><body>login</body></html>",
    "a word": b"Internal Server Error",
    "no choices": {"id": "x", "choices": [], "usage": None},
    "null": None,
    "another object": {"hello": "world"},
    "an error": {"error": {"message": "Provider returned error", "code": 502}},
    "a status": {"statusCode": 503, "message": "try again"},
    "a word for it": {"error": "overloaded"},
    "Cloudflare's errors": {
        "success": False,
        "result": None,
        "errors": [{"code": 3040, "message": "Capacity exceeded"}],
    },
    "Baidu's": {"error_code": 336100, "error_msg": "try again"},
    "MiniMax's": {"choices": None, "base_resp": {"status_code": 1000, "status_msg": "unknown error"}},
    "a choice without an answer": {"choices": [{"index": 0, "message": None, "finish_reason": None}]},
}


@pytest.mark.parametrize("name", NO_ANSWERS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_200_without_an_answer_is_asked_for_again(name: str, stream: bool) -> None:
    """It is trouble of the endpoint's or of a proxy's, as a 502 is."""

    def respond(asked: Asked) -> Any:
        if asked.number:
            return answered(asked, asked.said(shout))
        body = NO_ANSWERS[name]
        if stream and asked.body.get("stream") and not isinstance(body, bytes):
            return events(body)
        return reply(body, kind="text/event-stream" if stream else "application/json")

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        assert await batch_of_four(batched) == FOUR
    assert len(endpoint.asked) == 2
    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        assert (await batched.submit(ask("t0"))).output == "T0!"
    assert len(endpoint.asked) == 2


async def test_the_status_within_an_error_counts() -> None:
    """An error object under 200 is what it says that it is."""
    for status, kind in ((429, mb.errors.RateLimited), (401, mb.errors.AuthFailed), (404, mb.errors.BadRequest)):
        with pytest.raises(kind):
            await send(lambda _, status=status: reply({"error": {"code": status, "message": "x"}}))


async def test_advice_about_the_address_is_given_until_it_has_answered() -> None:
    """An address that has answered is right, so its trouble is of another kind."""
    answers = [reply(b"<html>"), reply(whole("hi")), reply(b"<html>")]
    async with odd_endpoint(lambda asked: answers[asked.number]) as endpoint:
        chat = mb.OpenAIChat("m", base_url=endpoint.url)
        said: list[str] = []
        for _ in answers:
            try:
                await chat.send(ChatCall(messages=[{"role": "user", "content": "x"}]), said.append)
            except ServerError as error:
                said.append(str(error))
        await chat.aclose()
    assert ["base_url" in each for each in said] == [True, False, False]


# Ends


@pytest.mark.parametrize(
    ("word", "finish"),
    [
        ("stop", "stop"),
        ("eos", "stop"),
        ("END_TURN", "stop"),
        ("FINISH_REASON_STOP", "stop"),
        ("max_tokens", "length"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
        ("function_call", "tool_calls"),
        ("abort", None),
        ("insufficient_system_resource", None),
        ("quux", None),
        ({"type": "length", "length": 16}, "length"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_the_reason_for_the_end_is_told_in_one_set_of_words(word: Any, finish: str | None, stream: bool) -> None:
    """The body keeps the endpoint's own."""
    respond = lambda _: streamed("hi", word) if stream else reply(whole("hi", word))  # noqa: E731
    text, completion = await send(respond, stream=stream)
    assert (text, completion.finish_reason) == ("hi", finish)
    if completion.body is not None:
        assert completion.body["choices"][0]["finish_reason"] == word


@pytest.mark.parametrize("word", [None, "", "null"])
async def test_a_reply_that_is_all_there_needs_no_word_for_it(word: Any) -> None:
    """A JSON body is whole, and so is a stream that says [DONE]; a stream that just ends is not."""
    assert (await send(lambda _: reply(whole("hi", word)), stream=False))[1].finish_reason == "stop"
    assert (await send(lambda _: streamed("hi", word)))[1].finish_reason == "stop"
    assert (await send(lambda _: events(chunk("hi"), chunk({}, word), done=False)))[1].finish_reason is None
    assert (await send(lambda _: reply(whole("", word)), stream=False))[1].finish_reason is None
    tools = {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
    assert (await send(lambda _: reply(whole(None, word, message=tools)), stream=False))[
        1
    ].finish_reason == "tool_calls"


@pytest.mark.parametrize("word", ["abort", "error_timeout", "insufficient_system_resource", "OTHER", "cancelled"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_text_that_was_broken_off_is_never_handed_out(word: str, stream: bool) -> None:
    """It is asked for again."""

    def respond(asked: Asked) -> Any:
        return answered(asked, "wh", word) if asked.number < 2 else answered(asked, "whole")

    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url, stream=stream) as batched:
        assert (await batched.submit(ask("x"))).output == "whole"
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize("word", ["eos", "end_turn", "STOP", "COMPLETE", "stop_sequence"])
async def test_sound_answers_are_cached_whatever_the_word_for_their_end(word: str) -> None:
    """Only what ended by itself is kept, and these words say that it did."""
    respond = lambda asked: answered(asked, asked.said(shout), word)  # noqa: E731
    async with odd_endpoint(respond) as endpoint:
        chat = mb.OpenAIChat("m", base_url=endpoint.url)
        async with mb.Microbatcher(chat, cache=mb.MemoryCache(), tokens="bytes") as batched:
            first = await batched.submit(ask("x"))
            assert (first.finish_reason, (await batched.submit(ask("x"))).route) == ("stop", "cache")


async def test_a_typed_answer_cut_at_the_limit_is_said_to_be_so() -> None:
    """Also where the endpoint has another word for the limit."""
    respond = lambda asked: answered(asked, '{"answer": "ye', "max_tokens")  # noqa: E731
    async with odd_endpoint(respond) as endpoint, batcher(endpoint.url) as batched:
        with pytest.raises(TruncatedReply):
            await batched.submit(ask("x"), output_type=Literal["yes", "no"])


@pytest.mark.parametrize("first", [[chunk("", "stop"), 0.3], [chunk("", "stop")], []])
async def test_a_finish_reason_with_every_chunk_ends_nothing(monkeypatch: pytest.MonkeyPatch, first: list[Any]) -> None:
    """Text after a finish reason shows that it was none; then only silence ends the stream."""
    monkeypatch.setattr("microbatch.transports.attempt.FINISH_GRACE", 0.15)
    quick = [part for letter in "quickly" for part in (chunk(letter, "stop"), 0.02)]
    slow = [part for letter in "slow" for part in (chunk(letter, "stop"), 0.3)]
    text, completion = await send(lambda _: events(*first, *quick, *slow, chunk({}, "stop")))
    assert (text, completion.finish_reason) == ("quicklyslow", "stop")


async def test_an_open_connection_after_the_end_is_not_waited_for_with_or_without_done() -> None:
    """The text is there, and two seconds are enough for what else there is to come."""
    for done in (True, False):
        pieces = events(chunk("hi"), chunk({}, "stop"), done=done)[:-1]
        async with asyncio.timeout(PATIENCE):
            assert (await send(lambda _, pieces=pieces: [*pieces, FOR_EVER]))[0] == "hi"


# Time


@pytest.mark.parametrize(
    "first",
    [
        [],
        [b": keep-alive", 0.1] * 4,
        [{"choices": [], "prompt_filter_results": []}],
        [chunk({"role": "assistant", "content": ""})],
    ],
)
async def test_before_the_first_words_only_the_timeout_counts(first: list[Any]) -> None:
    """Models that reason say nothing for minutes, and CPU servers take as long to read a prompt."""
    text, _ = await send(lambda _: events(*first, 0.4, chunk("hi"), chunk({}, "stop")), idle_timeout=0.2)
    assert text == "hi"
    with pytest.raises(TransportTimeout, match="timeout"):
        await send(lambda _: events(*first, FOR_EVER), idle_timeout=0.1, timeout=0.7)


@pytest.mark.parametrize("alive", [[], [b": keep-alive", 0.05] * 600])
@pytest.mark.parametrize("begun", [chunk("h"), chunk({"reasoning_content": "hm"})])
async def test_after_the_first_words_silence_counts(alive: list[Any], begun: Any) -> None:
    """And keep-alive comments are silence."""
    with pytest.raises(TransportTimeout, match="idle_timeout"):
        await send(lambda _: events(begun, *alive, FOR_EVER), idle_timeout=0.2)


async def test_a_relayed_stream_may_be_silent_before_its_first_bytes() -> None:
    """The same rule for what is passed on as it is."""
    pieces = [events(done=False)[0], 0.5, b"1\r\nx\r\n", 0.05, b"0\r\n\r\n"]
    async with odd_endpoint(lambda _: pieces) as endpoint:
        chat = mb.OpenAIChat("m", base_url=endpoint.url, idle_timeout=0.2)
        async with chat.forward("POST", "/chat/completions", {}, b"{}") as relayed:
            assert [piece async for piece in relayed] == [b"x"]
        await chat.aclose()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_fault_in_the_framing_of_a_body_ends_its_attempt(stream: bool) -> None:
    *begun, _, _ = (
        events(chunk("a"))
        if stream
        else [b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n", b"", b""]
    )
    with pytest.raises(ConnectFailed, match="in the middle"):
        await send(lambda _: [*begun, 0.2, b"no length\r\n", FOR_EVER], stream=stream)


async def test_a_fault_in_the_framing_of_a_relayed_body_ends_it() -> None:
    head = b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with odd_endpoint(lambda _: [head, b"1\r\na\r\n", 0.2, b"no length\r\n", FOR_EVER]) as endpoint:
        chat = mb.OpenAIChat("m", base_url=endpoint.url)
        try:
            async with asyncio.timeout(PATIENCE), chat.forward("POST", "/files", {}, b"{}") as answer:
                with pytest.raises(ConnectFailed, match="in the middle"):
                    assert [piece async for piece in answer] == [b"a"]
        finally:
            await chat.aclose()


def in_pieces(raw: bytes, *cuts: int, pause: float) -> list[Any]:
    """Return a stream of *raw* that is cut at *cuts*, with a pause at each cut."""
    parts = [raw[start:end] for start, end in pairwise([0, *cuts, len(raw)])]
    sent = [each for part in parts for each in (b"%x\r\n%b\r\n" % (len(part), part), pause)]
    return [events(done=False)[0], *sent[:-1], b"0\r\n\r\n"]


@pytest.mark.parametrize("cut", range(1, 8))
async def test_a_relayed_stream_may_be_silent_in_the_name_of_its_first_field(cut: int) -> None:
    pieces = in_pieces(b"data: {}\n\n", cut, pause=0.5)
    async with odd_endpoint(lambda _: pieces) as endpoint:
        chat = mb.OpenAIChat("m", base_url=endpoint.url, idle_timeout=0.2)
        async with chat.forward("POST", "/chat/completions", {}, b"{}") as relayed:
            assert b"".join([piece async for piece in relayed]) == b"data: {}\n\n"
        await chat.aclose()


@pytest.mark.parametrize(
    "raw",
    [b"data: {}\n\n: y\n\n", b": x\r\rdata: {}\r\n\r\n", gzip.compress(b"data: {}\n\n")],
    ids=["LF", "CR", "gzip"],
)
async def test_a_relayed_stream_that_has_begun_in_small_pieces_has_begun(raw: bytes) -> None:
    pieces = in_pieces(raw, *range(1, len(raw)), pause=0.0)
    pieces = [*pieces[:-1], 1.0, pieces[-1]]
    async with odd_endpoint(lambda _: pieces) as endpoint:
        chat = mb.OpenAIChat("m", base_url=endpoint.url, first_timeout=0.5)
        async with chat.forward("POST", "/chat/completions", {}, b'{"stream":true}') as relayed:
            assert b"".join([piece async for piece in relayed]) == raw
        await chat.aclose()


@pytest.mark.parametrize("broken", [["reset"], [b"no length\r\n"], [FOR_EVER]])
async def test_a_finish_reason_with_every_chunk_completes_no_broken_text(broken: list[Any]) -> None:
    begun = events(chunk("a", "stop"), chunk("b", "stop"), done=False)[:-1]
    with pytest.raises((ConnectFailed, TransportTimeout)):
        await send(lambda _: [*begun, 0.2, *broken], idle_timeout=0.5)


async def test_a_finish_reason_at_the_end_completes_a_text_whose_connection_breaks() -> None:
    begun = events(chunk("a"), chunk("b"), chunk("", "stop"), done=False)[:-1]
    text, completion = await send(lambda _: [*begun, 0.2, "reset"])
    assert (text, completion.finish_reason) == ("ab", "stop")
