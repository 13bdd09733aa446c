"""Replies that are not quite of the documented types are read all the same; what cannot be read leaves a gap."""

from __future__ import annotations

import pytest

from microbatch.messages import Usage
from microbatch.transports.lenient import decode_body
from microbatch.transports.reply_reader import GAP, ReplyReader


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (b'{"choices":[{"delta":{"content":"a"}}]}', "a"),
        (b'{"choices":[{"delta":{"content":1.50}}]}', "1.50"),
        (b'{"choices":[{"index":"0","delta":{"content":true}}]}', "true"),
        (b'{"choices":[{"index":"1.0","delta":{"content":7}}]}', ""),
        (b'{"choices":[{"index":"first","delta":{"content":7}}]}', "7"),
        (b'{"choices":[{"delta":{"content":"a","refusal":5}}]}', "a"),
        (b'{"choices":[{"delta":{"content":"a"}}],"system_fingerprint":NaN}', "a"),
        (b'{"choices":[null,{"index":1}],"created":NaN}', ""),
        (b'{"choices":[{"delta":{"content":[{"type":"thinking","text":"x"},{"text":"a"},5]}}]}', "a5"),
        (b'{"choices":null,"created":NaN}', ""),
    ],
)
def test_unusual_types_are_read(event: bytes, text: str) -> None:
    assert ReplyReader().event(event) == text


@pytest.mark.parametrize(
    "event",
    [
        b"{",
        b"[1]",
        b'{"choices":{}}',
        b'{"choices":[5]}',
        b'{"choices":[{"delta":5}]}',
        b'{"choices":[{"message":[]}]}',
        b'{"choices":[{"delta":{"content":[["a"]]}}]}',
    ],
)
def test_what_is_no_chat_completion_leaves_a_gap(event: bytes) -> None:
    reader = ReplyReader()
    assert reader.event(b'{"choices":[{"delta":{"content":"a"}}]}') == "a"
    assert reader.event(event) == GAP
    assert reader.completion(None).damaged


def test_the_end_of_a_cut_stream_is_no_damage() -> None:
    reader = ReplyReader()
    assert reader.event(b'{"choices":[{"del', torso=True) == ""
    assert not reader.completion(None).damaged


def test_bookkeeping_is_kept_whatever_the_rest_is_like() -> None:
    reader = ReplyReader()
    event = b'{"choices":[{"delta":{"content":3}}],"model":"m","usageMetadata":{"promptTokenCount":3,"x":NaN}}'
    assert reader.event(event) == "3"
    completion = reader.completion("r-1")
    assert (completion.model, completion.usage, completion.request_id) == ("m", Usage(3, 0), "r-1")


@pytest.mark.parametrize("depth", [900, 100_000])
def test_a_deeply_nested_body_is_read_or_is_no_json(depth: int) -> None:
    body = b"[" * depth + b"NaN" + b"]" * depth
    try:
        assert decode_body(body)
    except ValueError:
        assert depth == 100_000


DIGITS = b"9" * 5000  # more than Python converts


@pytest.mark.parametrize(
    "beside", [b'"created":' + DIGITS, b'"usage":{"prompt_tokens":' + DIGITS + b"}", b'"x":[-' + DIGITS + b"]"]
)
def test_a_number_of_any_length_beside_the_text_is_no_harm(beside: bytes) -> None:
    reader = ReplyReader()
    assert reader.whole(b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}],' + beside + b"}") == "a"
    body = reader.completion(None).body
    assert body is not None
    assert body["choices"][0]["message"]["content"] == "a"


def test_what_is_beside_the_text_can_be_encoded_too() -> None:
    reader = ReplyReader()
    for event in (
        b'{"model":"m\\ud83d","choices":[{"delta":{"refusal":"no \\ud83d"}}]}',
        b'{"choices":[{"delta":{"refusal":"\\ude00 \\ud83d"},"finish_reason":"stop"}]}',
    ):
        assert reader.event(event) == ""
    completion = reader.completion(None)
    assert (completion.refusal, completion.model) == ("no \U0001f600 \ufffd", "m\ufffd")
