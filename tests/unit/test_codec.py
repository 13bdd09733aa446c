"""The codec of combined chat calls: what it composes, and how it reads the replies."""

from __future__ import annotations

import json
from typing import Literal

import msgspec
import pytest

import microbatch as mb
from microbatch.batching.request import read_options
from microbatch.prompt.codec import ChatCodec
from microbatch.prompt.compose import instruction, item_line, output_reserve
from microbatch.protocols import Completion

ENDINGS = ["kfqzt", "bcdfg", "hjkmn", "pqrst", "vwxzb"]
SHARED = [{"role": "system", "content": "Label each product."}]
TEXTS = ["a lamp", "a shirt"]


def fixed(count):
    return [ENDINGS[number % 5] for number in range(count)]


def options(output_type=str, max_tokens=None):
    return read_options(output_type, "gpt-4o", max_tokens, 0.5, {"top_p": 1}, {"x-a": "b"}, None, "normal")


def combined(codec, settings, bound=None):
    return codec.compose(settings, SHARED, [item_line(text) for text in TEXTS], bound)


def elements(*pairs):
    return json.dumps({"results": [{"id": name, "answer": answer} for name, answer in pairs]})


def test_a_combined_call_has_the_settings_of_its_requests_and_one_line_for_each():
    settings = options(max_tokens=10)
    found = combined(ChatCodec(fixed), settings)
    assert found.ids == ["1kfqzt", "2bcdfg"]
    assert found.canary is None
    assert found.call.messages == [
        *SHARED,
        {"role": "user", "content": instruction(settings.answer.words) + '[1kfqzt] "a lamp"\n[2bcdfg] "a shirt"\n'},
    ]
    assert (found.call.model, found.call.params) == ("gpt-4o", {"top_p": 1, "temperature": 0.5})
    assert found.call.headers == {"x-a": "b"}
    assert found.call.max_tokens == 2 * output_reserve(10)
    assert combined(ChatCodec(fixed), options(), bound=300).call.bound == 300


def test_with_a_canary_one_more_line_is_asked_for_under_a_schema_that_allows_its_word():
    settings = options(Literal["home", "clothing"], max_tokens=10)
    found = combined(ChatCodec(fixed, canary=True), settings)
    assert found.canary == "kfqztbcdfg"
    assert len(found.ids) == 3
    assert found.call.messages[-1]["content"].endswith('[3hjkmn] "Reply with exactly: kfqztbcdfg"\n')
    assert found.call.schema == settings.answer.watched_schema
    assert found.call.max_tokens > 2 * output_reserve(10)


@pytest.mark.parametrize("word", ["kfqztbcdfg", "home"])
def test_answers_are_delivered_only_if_the_canary_is_answered_right(word):
    codec, settings = ChatCodec(fixed, canary=True), options()
    found = combined(codec, settings)
    reply = codec.demultiplex(found.ids, [settings.answer.decode] * 2, found.canary, early=False)
    assert reply.feed(elements(*zip(found.ids, ["home", "clothing", word], strict=True))) == []
    answers = reply.close("complete")
    assert reply.trusted == (word == found.canary)
    assert [position for position, _ in answers] == ([0, 1] if reply.trusted else [])
    assert [position for position, _ in reply.unanswered("complete")] == ([] if reply.trusted else [0, 1])


@pytest.mark.parametrize(("ending", "error"), [("complete", mb.MissingAnswer), ("length", mb.TruncatedReply)])
def test_what_a_reply_leaves_unanswered_has_an_error_that_says_why(ending, error):
    codec, settings = ChatCodec(fixed), options()
    reply = codec.demultiplex(combined(codec, settings).ids, [settings.answer.decode] * 2, None, early=True)
    assert [position for position, _ in reply.feed(elements(("1kfqzt", "home")))] == [0]
    assert reply.heard
    assert reply.sound
    assert reply.close(ending) == []
    ((position, why),) = reply.unanswered(ending)
    assert position == 1
    assert isinstance(why, error)


def test_a_request_alone_keeps_its_own_messages_and_answer():
    settings = options(Literal["home"], max_tokens=10)
    call = ChatCodec().compose_alone(settings, settings.answer, SHARED)
    assert call.messages == SHARED
    assert (call.schema, call.hint, call.max_tokens) == (settings.answer.single_schema, settings.answer.hint, 10)


@pytest.mark.parametrize(
    ("content", "thought", "only_reasoning"),
    [("", True, True), ("", False, False), ("<think>hm</think>", False, True), ("yes", True, False)],
)
def test_a_reply_that_is_reasoning_and_nothing_else_is_told_from_an_empty_one(content, thought, only_reasoning):
    completion = Completion("stop", thought=thought)
    reply = ChatCodec().read_alone(options().answer, completion, content, combinable=True)
    assert reply.only_reasoning == only_reasoning
    assert (reply.error is None) == (content == "yes")


def test_thoughts_are_kept_where_that_is_asked_for():
    text, answer = "<think>hm</think>yes", options().answer
    kept = ChatCodec(keep_thoughts=True).read_alone(answer, Completion("stop"), text, combinable=True)
    stripped = ChatCodec().read_alone(answer, Completion("stop"), text, combinable=True)
    assert (kept.text, stripped.text) == (text, "yes")


def test_a_single_reply_of_which_a_part_could_not_be_read_is_no_answer():
    reply = ChatCodec().read_alone(options().answer, Completion("stop", damaged=True), "y\0", combinable=True)
    assert isinstance(reply.error, mb.MalformedAnswer)


def test_the_settings_of_a_struct_are_read_as_they_are():
    class Product(msgspec.Struct):
        colour: str

    settings = options(Product)
    reply = ChatCodec().read_alone(settings.answer, Completion("stop"), '{"colour": "red"}', combinable=True)
    assert reply.output == Product("red")
