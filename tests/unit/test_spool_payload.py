"""What a spool keeps of a request and of its answer."""

from __future__ import annotations

import json
from typing import Literal

import msgspec
import pydantic
import pytest
from helpers import ask, each
from hypothesis import given
from hypothesis import strategies as st
from output_types import ALL_TYPES, Category, Colour, Node, Plain, Product, given_schema

from microbatch.batching.request import read_messages, read_options
from microbatch.errors import ConfigError, MalformedAnswer, StorageError
from microbatch.messages import Message, Reply, Usage
from microbatch.schema.answer_type import answer_type
from microbatch.spool.payload import Answer, Payload
from microbatch.spool.records import Name

NAME = Name("acme", "7")
OBJECT = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}, "required": ["b", "a"]}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": OBJECT}}

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def backwards(value):
    """The same JSON with the keys of every object in the opposite order."""
    if isinstance(value, dict):
        return {key: backwards(one) for key, one in reversed(value.items())}
    return [backwards(one) for one in value] if isinstance(value, list) else value


@given(
    text=st.text(),
    model=st.none() | st.text(),
    max_tokens=st.none() | st.integers(1, 9_999),
    temperature=st.none() | st.floats(0, 2),
    extra=st.dictionaries(st.sampled_from(["user", "top_p", "metadata", "verbosity"]), values),
)
def test_a_request_comes_back_as_it_was_put(text, model, max_tokens, temperature, extra):
    messages = ask(text)
    asked = {"model": model, "max_tokens": max_tokens, "temperature": temperature, "params": extra}
    payload = Payload.decode(Payload.of(messages, **asked).encode())
    assert payload.messages == messages
    assert (payload.model, payload.max_tokens, payload.temperature, payload.params) == (
        model,
        max_tokens,
        temperature,
        extra,
    )


@given(extra=st.dictionaries(st.text(max_size=5).map("x-".__add__), values))
def test_equal_requests_have_equal_bytes_whatever_the_order_of_their_keys(extra):
    one = Payload.of(ask("Hi."), params={"user": "u", **extra})
    other = Payload.of(backwards(ask("Hi.")), params=backwards({"user": "u", **extra}))
    assert one.encode() == other.encode()
    assert one.item(NAME) == other.item(NAME)


def test_dicts_and_message_objects_that_say_the_same_have_equal_bytes():
    objects = [Message("system", "Shout."), Message("user", "Hi.")]
    assert Payload.of(objects).encode() == Payload.of(ask("Hi.")).encode()


@pytest.mark.parametrize(
    "params",
    [
        {"response_format": given_schema(OBJECT)},
        {"tools": [TOOL]},
        {"functions": [TOOL["function"]]},
    ],
)
def test_the_order_of_properties_survives_since_models_write_them_in_order(params):
    payload = Payload.decode(Payload.of(ask("Hi."), params=params).encode())
    assert json.dumps(payload.params) == json.dumps(params)
    swapped = json.loads(json.dumps(params).replace('"b"', '"c"').replace('"a"', '"b"').replace('"c"', '"a"'))
    assert Payload.of(ask("Hi."), params=swapped).item(NAME).digest != payload.item(NAME).digest


@pytest.mark.parametrize(
    "changed",
    [
        {"messages": ask("Bye.")},
        {"messages": ask("Hi.", system="Whisper.")},
        {"model": "m"},
        {"max_tokens": 9},
        {"temperature": 0.0},
        {"params": {"top_p": 1}},
        {"output_type": Category},
        {"output_type": Literal["a", "b"]},
    ],
)
def test_another_request_has_another_digest(changed):
    asked = {"messages": ask("Hi.")}
    assert Payload.of(**asked).item(NAME).digest != Payload.of(**{**asked, **changed}).item(NAME).digest


def test_the_order_of_choices_is_part_of_a_request():
    digests = {
        Payload.of(ask("Hi."), output_type=kind).item(NAME).digest for kind in (Literal["a", "b"], Literal["b", "a"])
    }
    assert len(digests) == 2


def test_an_item_names_the_request_and_holds_a_digest_of_128_bits():
    item = Payload.of(ask("Hi.")).item(NAME)
    assert item.name == NAME
    assert len(item.digest) == 16
    assert Payload.decode(item.payload) == Payload.of(ask("Hi."))


@each("output_type", ALL_TYPES)
def test_a_worker_knows_every_output_type_by_its_schema(output_type):
    """What the worker reads from the bytes asks for the same schemas, in the same words, as the caller's own type."""
    payload = Payload.decode(Payload.of(ask("Hi."), output_type=output_type).encode())
    known, own = payload.options("acme").answer, answer_type(output_type)
    assert msgspec.json.encode(known.schema) == msgspec.json.encode(own.schema)
    assert msgspec.json.encode(known.batch_schema) == msgspec.json.encode(own.batch_schema)
    assert (known.words, known.hint, known.strict, known.wrapped) == (own.words, own.hint, own.strict, own.wrapped)


def test_plain_text_stays_plain_text():
    payload = Payload.decode(Payload.of(ask("Hi.")).encode())
    assert payload.params == {}
    assert payload.options(None).answer.is_text


def test_a_schema_given_loosely_stays_loose():
    loose = {"type": "json_schema", "json_schema": {"name": "x", "strict": False, "schema": OBJECT}}
    payload = Payload.decode(Payload.of(ask("Hi."), params={"response_format": loose}).encode())
    assert payload.params == {"response_format": loose}
    assert not payload.options(None).answer.strict


def test_a_worker_asks_as_the_caller_would_have_asked():
    asked = {"model": "m", "max_tokens": 9, "temperature": 0.5, "params": {"top_p": 0.9}}
    payload = Payload.decode(Payload.of(ask("Hi."), **asked).encode())
    request = payload.request(NAME)
    assert (request.id, request.tenant, request.priority, request.headers) == ('["acme","7"]', "acme", "low", None)
    options = read_options(
        request.output_type, request.model, request.max_tokens, request.temperature, request.params, None, "acme", "low"
    )
    own = read_options(str, "m", 9, 0.5, {"top_p": 0.9}, None, "acme", "low")
    alike = read_messages(ask("Hi."), own)
    assert read_messages(request.messages, options) == alike
    assert read_messages(payload.messages, payload.options("acme")) == alike


@each(
    ("asked", "words"),
    [
        ({"messages": "Hi."}, "messages must be a non-empty list"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": [{"content": "Hi."}]}, r"messages\[0\]"),
        ({"messages": [{"role": "user", "content": object()}]}, "messages must be JSON"),
        ({"messages": ask("\ud800")}, "messages must be JSON"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": 5}, "model must be a string"),
        ({"temperature": "hot"}, "temperature"),
        ({"params": {"stream": True}}, "params: stream"),
        ({"params": {"max_completion_tokens": 5}}, "params: max_completion_tokens"),
        ({"params": {"user": object()}}, "params must be JSON"),
        ({"params": {"response_format": {"type": "json_schema"}}}, "response_format"),
        ({"params": {"response_format": given_schema({"type": 5})}}, "malformed"),
        ({"output_type": Plain}, "Plain"),
        ({"output_type": int, "params": {"response_format": given_schema(OBJECT)}}, "not both"),
    ],
)
def test_a_wrong_argument_is_a_config_error_before_anything_is_kept(asked, words):
    with pytest.raises(ConfigError, match=words):
        Payload.of(**{"messages": ask("Hi."), **asked})


@each("raw", [b"", b"{", b"[]", b"{}", b'{"messages":5}', b"\xff", b"[" * 100_000])
@each("kind", [Payload, Answer])
def test_damaged_bytes_are_a_storage_error_that_quotes_nothing(kind, raw):
    with pytest.raises(StorageError, match="damaged") as caught:
        kind.decode(raw)
    assert caught.value.__cause__ is None


def test_nothing_told_of_a_request_or_an_answer_holds_its_words():
    payload = Payload.of(ask("secret"), model="m", params={"user": "secret"})
    answer = Answer(text="secret", answered_at=0.0, body={"x": "secret"})
    for told in (payload, answer, payload.item(NAME)):
        assert "secret" not in repr(told)


def reply(**fields):
    return Reply(**{"output": "Yes.", "text": "Yes.", "route": "batch", "usage": Usage(9, 2, 1), **fields})


def test_an_answer_comes_back_as_the_reply_that_it_was():
    said = reply(cost_usd=0.5, batch_size=8, model="m-1", finish_reason="stop", request_id="req_1", body={"id": "x"})
    kept = Answer.decode(Answer.of(said, 12.5, is_json=False).encode())
    assert kept.answered_at == 12.5
    again = kept.reply()
    for name in (
        "output",
        "text",
        "route",
        "usage",
        "cost_usd",
        "batch_size",
        "model",
        "finish_reason",
        "request_id",
        "body",
    ):
        assert getattr(again, name) == getattr(said, name), name


def test_usage_that_was_never_reported_stays_an_estimate():
    assert Answer.decode(Answer.of(reply(usage=Usage(9, 2, 0, True)), 0.0, is_json=False).encode()).usage.estimated


@pytest.mark.parametrize(
    ("output_type", "text", "output"),
    [
        (str, "Yes.", "Yes."),
        (str, '{"category":"home"}', '{"category":"home"}'),
        (Category, '{"category":"home"}', Category("home")),
        (Colour, '"red"', Colour.RED),
        (Node, '{"value":1,"next":null}', Node(1)),
        (int, "7", 7),
    ],
)
def test_an_answer_is_decoded_to_the_type_that_is_asked_for(output_type, text, output):
    again = Answer(text=text, answered_at=0.0).reply(output_type)
    assert again.output == output
    assert again.text == text


class Picky(pydantic.BaseModel):
    title: str

    @pydantic.field_validator("title")
    @classmethod
    def refuse(cls, value):
        raise ValueError("never")


@pytest.mark.parametrize(
    ("output_type", "text"), [(Category, '{"category":"cars"}'), (Product, "Yes."), (Picky, '{"title":"x"}')]
)
def test_an_answer_of_another_shape_is_malformed_and_keeps_what_was_said(output_type, text):
    with pytest.raises(MalformedAnswer) as caught:
        Answer(text=text, answered_at=0.0).reply(output_type)
    assert caught.value.raw == text
    assert text not in str(caught.value)


def test_a_type_that_cannot_be_used_is_a_config_error():
    with pytest.raises(ConfigError, match="Plain"):
        Answer(text="{}", answered_at=0.0).reply(Plain)
