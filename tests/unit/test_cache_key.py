"""Whatever differs in a request gives it another key; what is written differently and means the same does not."""

import copy

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.batching.request import read_options
from microbatch.caching.key import Keys

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
    "params": [{"top_p": 0.25}, {"top_k": 0.5}, {"top_p": 0.5, "user": "u"}, {"top_p": "0.5"}, {}],
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
