"""Whatever differs in a request gives it another key; what is written differently and means the same does not."""

import asyncio
import copy

import msgspec
import pytest
from helpers import ask
from hypothesis import given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.batching.request import read_options
from microbatch.caching.key import Keys
from microbatch.caching.question import IGNORED_FIELDS, IGNORED_HEADERS, IGNORED_PREFIXES
from microbatch.testing import ScriptedTransport
from microbatch.transports.credentials import says_who

SECRET = bytes(32)


class Fact(msgspec.Struct):
    number: int


REQUEST = {
    "messages": [{"role": "system", "content": "Shout."}, {"role": "user", "content": "hello"}],
    "output_type": str,
    "model": "m",
    "max_tokens": 8,
    "temperature": 0.5,
    "params": {"top_p": 0.5},
    "headers": {"Authorization": "Bearer a", "OpenAI-Project": "p"},
    "tenant": "t",
    "priority": "normal",
}
OTHER = {
    "messages": [
        [{"role": "system", "content": "Shout!"}, {"role": "user", "content": "hello"}],
        [{"role": "system", "content": "Shout."}, {"role": "user", "content": "Hello"}],
        [{"role": "system", "content": "Shout."}, {"role": "user", "content": "hello "}],
        [{"role": "system", "content": "Shout.hello"}],
        [{"role": "system", "content": "Shout."}, {"role": "user", "content": "hello", "name": "n"}],
        [{"role": "developer", "content": "Shout."}, {"role": "user", "content": "hello"}],
        [{"role": "user", "content": "hello"}],
        [{"role": "user", "content": "hello"}, {"role": "system", "content": "Shout."}],
    ],
    "output_type": [int, Fact, list[int]],
    "model": ["n", "M", None],
    "max_tokens": [9, None],
    "temperature": [0.25, 1, None],
    "params": [{"top_p": 0.25}, {"top_k": 0.5}, {"top_p": 0.5, "tags": ["u"]}, {"top_p": "0.5"}, {}],
    "headers": [
        {"Authorization": "Bearer b", "OpenAI-Project": "p"},
        {"Authorization": "Bearer a"},
        {"Authorization": "Bearer a", "OpenAI-Project": "P"},
        None,
    ],
    "tenant": ["u", "T", "", None],
}


def key(request, *, secret=SECRET, endpoint="http://a/v1", model=None, normalize=None):
    options = {name: value for name, value in request.items() if name != "messages"}
    keys = Keys(secret, endpoint=endpoint, model=model, normalize=normalize)
    return keys.of(request["messages"], read_options(**options))


@pytest.mark.promise(of="lane")
@pytest.mark.parametrize("field", OTHER)
def test_a_change_of_any_field_makes_another_key(field):
    seen = {key(REQUEST)} | {key({**REQUEST, field: value}) for value in OTHER[field]}
    assert len(seen) == 1 + len(OTHER[field])


@pytest.mark.promise(of="lane")
def test_endpoint_model_and_secret_are_part_of_the_key():
    plain = {**REQUEST, "model": None}
    seen = {
        key(plain),
        key(plain, endpoint="http://b/v1"),
        key(plain, model="m"),
        key(plain, model="n"),
        key(plain, secret=bytes(31) + b"\1"),
    }
    assert len(seen) == 5


def test_a_model_named_by_the_transport_or_by_the_call_is_the_same():
    assert key({**REQUEST, "model": None}, model="m") == key(REQUEST)


_texts = st.text(st.characters(exclude_categories=["Cs"]))
_messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": _texts}), min_size=1, max_size=3
)


@pytest.mark.promise(of="lane")
@given(one=_messages, other=_messages)
def test_keys_are_equal_for_equal_messages_only(one, other):
    assert (key({**REQUEST, "messages": one}) == key({**REQUEST, "messages": other})) == (one == other)


def test_who_asks_with_which_priority_and_with_which_kind_of_message_makes_no_difference():
    messages = [mb.Message(**message) for message in REQUEST["messages"]]
    for same in (
        {**REQUEST, "priority": "low"},
        {**REQUEST, "messages": messages},
        {**REQUEST, "headers": {"authorization": "Bearer a", "openai-project": "p"}},
        {**REQUEST, "messages": [dict(reversed(message.items())) for message in REQUEST["messages"]]},
        copy.deepcopy(REQUEST),
    ):
        assert key(same) == key(REQUEST)


def test_normalize_makes_last_messages_equal_and_no_others():
    def ask(text, system="Shout."):
        return {**REQUEST, "messages": [{"role": "system", "content": system}, {"role": "user", "content": text}]}

    assert key(ask(" Hello"), normalize=lambda text: text.strip().lower()) == key(ask("hello"), normalize=str.lower)
    assert key(ask("hello", "shout."), normalize=str.lower) != key(ask("hello"), normalize=str.lower)
    as_message = {**REQUEST, "messages": [mb.Message("user", " a ")]}
    assert key(as_message, normalize=str.strip) == key({**REQUEST, "messages": [mb.Message("user", "a")]})
    parts = {**REQUEST, "messages": [{"role": "user", "content": [{"type": "text", "text": "A"}]}]}
    assert key(parts, normalize=str.lower) == key(parts)


@pytest.mark.promise(of="callbacks")
@pytest.mark.parametrize(
    ("normalize", "words"),
    [
        (lambda _: 1 / 0, "normalize raised ZeroDivisionError"),
        (lambda _: None, "normalize must return a string, got NoneType"),
    ],
)
def test_a_normalize_that_fails_is_a_clear_error(normalize, words):
    with pytest.raises(mb.ConfigError, match=words):
        key(REQUEST, normalize=normalize)


# --- what cannot change an answer

_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "number", "minimum": 0.0}}}
_X = {"type": "object", "properties": {"x": {"type": "number", "minimum": 0.0}}}
_TOOL_OF_X = {"type": "function", "function": {"name": "f", "parameters": _X}}
_X_FROM_1 = {"type": "object", "properties": {"x": {"type": "number", "minimum": 1.0}}}
_FORMAT_OF_X = {"type": "json_schema", "json_schema": {"name": "a", "schema": _X_FROM_1}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "ba2822c7579606f0b7ddcff635e42b290d617662"),
        ({"tenant": "é", "params": {}}, "b86ec356d799718fe8d5b3c17bf0f25e7e6e4be7"),
        (
            {name: value for name, value in REQUEST.items() if name not in ("messages", "priority")},
            "6774f0286e5ce0559bee1fb8c017cc13a85ecb52",
        ),
        (
            {
                "output_type": Fact,
                "temperature": 0.0,
                "params": {"top_k": 40, "thinking": {"type": "enabled", "budget_tokens": 1024}},
            },
            "7f71109cb9474a257c4e997b08a0cb353f0e80a5",
        ),
        (
            {"params": {"n": 2, "seed": 7, "logit_bias": {"50256": -100}, "stop": ["a"]}},
            "e345dd33c1217357236b357d26ed69038026f48e",
        ),
        ({"params": {"tools": [_TOOL_OF_X]}}, "81b3eb5aaf4584e0979ffecf9ed7872731b41333"),
        ({"params": {"response_format": _FORMAT_OF_X}}, "7ed5a7cc23a40b988d6aac3d810d4d833df5c0cd"),
        (
            {"params": {"chat_template_kwargs": {"enable_thinking": False}, "top_p": None}},
            "da9af00033bf3494884a02f8418c3a2532d077e2",
        ),
    ],
)
def test_keys_are_those_of_earlier_releases(options, expected):
    """Entries that are in a cache are found by the requests that stored them."""
    plain = dict.fromkeys(("model", "max_tokens", "temperature", "params", "headers", "tenant"))
    asked = {"messages": REQUEST["messages"], "output_type": str, "priority": "normal"} | plain | options
    assert key(asked, model="d").hex() == expected


def with_params(**params):
    return {**REQUEST, "params": params}


@pytest.mark.parametrize("name", sorted(IGNORED_FIELDS))
@pytest.mark.parametrize("value", ["a", {"b": "c"}, True, None])
def test_fields_that_say_who_asks_or_what_is_recorded_make_no_other_key(name, value):
    assert key(with_params(top_p=0.5, **{name: value})) == key(REQUEST)
    assert key(with_params(top_p=0.5, extra_body={name: value})) == key(REQUEST)
    assert key({**with_params(**{name: value}), "temperature": None}) == key({**with_params(), "temperature": None})


@pytest.mark.parametrize("inside", ["chat_template_kwargs", "provider"])
def test_an_ignored_name_counts_inside_another_field(inside):
    assert key(with_params(**{inside: {"user": "a"}})) != key(with_params(**{inside: {"user": "b"}}))


@pytest.mark.parametrize("name", [*sorted(IGNORED_HEADERS), *(f"{prefix}any" for prefix in IGNORED_PREFIXES)])
def test_headers_that_name_a_call_make_no_other_key_and_hold_no_credentials(name):
    assert key({**REQUEST, "headers": {**REQUEST["headers"], name.title(): "1"}}) == key(REQUEST)
    assert key({**REQUEST, "headers": {name: "1"}}) == key({**REQUEST, "headers": None})
    assert not says_who(name)


@pytest.mark.promise(of="lane")
@pytest.mark.parametrize(
    "name", ["authorization", "api-key", "x-api-key", "x-goog-api-key", "cookie", "openai-organization", "baggage"]
)
def test_headers_that_say_who_may_see_an_answer_make_another_key(name):
    seen = {key({**REQUEST, "headers": headers}) for headers in (None, {name: "a"}, {name: "b"})}
    assert len(seen) == 3


@pytest.mark.parametrize("values", [(0, 0.0, -0.0), (1, 1.0), (-2, -2.0), (2**53, 2.0**53)])
def test_equal_numbers_are_one_number(values):
    def keys_of(make):
        return {key({**REQUEST, **make(value)}) for value in values}

    assert len(keys_of(lambda value: {"temperature": value})) == 1
    assert len(keys_of(lambda value: {"params": {"top_k": value}})) == 1
    assert len(keys_of(lambda value: {"params": {"stop": [value], "seed": value}})) == 1
    assert len(keys_of(lambda value: {"params": {"thinking": {"budget": [{"tokens": value}]}}})) == 1


@pytest.mark.parametrize(
    "values", [(0, False), (1, True), (0, "0"), (0, None), (0.5, 0), (1e300, 1e301), (2**60, 2**60 + 1)]
)
def test_numbers_that_differ_and_what_is_no_number_make_other_keys(values):
    one, other = (key(with_params(chat_template_kwargs={"n": value})) for value in values)
    assert one != other


def test_a_tools_schema_counts_as_it_is_written():
    other = {**_TOOL, "function": {"name": "f", "parameters": {"type": "number", "minimum": 0}}}
    assert key(with_params(tools=[_TOOL])) != key(with_params(tools=[other]))


async def test_a_caller_is_served_the_answer_to_the_same_question_of_another():
    transport = ScriptedTransport()
    async with mb.Microbatcher(transport, cache=mb.MemoryCache(), tokens="bytes") as batcher:
        ways = [
            {"temperature": 0, "params": {"user": "ann"}, "headers": {"traceparent": "1"}},
            {"temperature": 0.0, "params": {"user": "bob", "store": True}, "headers": {"X-Request-Id": "2"}},
            {"temperature": -0.0},
        ]
        routes = [(await batcher.submit(ask("a"), **way)).route for way in ways]
        together = await asyncio.gather(*(batcher.submit(ask("b"), **way) for way in ways))
    assert routes == ["single", "cache", "cache"]
    assert sorted(reply.route for reply in together) == ["shared", "shared", "single"]
    assert len(transport.calls) == 2
