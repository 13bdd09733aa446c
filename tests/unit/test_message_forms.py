"""Messages in the forms that frameworks and data sets have them: what is a text is combined, what is more goes alone unchanged."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import types
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
from helpers import batcher_for, each
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage, ParsedChatCompletionMessage
from pydantic import BaseModel

import microbatch as mb
from microbatch.batching.request import PLAIN, read_messages
from microbatch.prompt.message_forms import as_texts, copy_of
from microbatch.spool.payload import Payload
from microbatch.testing import ScriptedTransport


class Text(str):
    """As templates return it; its own words for itself are another thing."""

    __slots__ = ()

    def __str__(self):
        return "no text"


class Word(enum.StrEnum):
    SYSTEM = "Shout."


class Old(str, enum.Enum):  # noqa: UP042 (that is the point)
    SYSTEM = "Shout."


class Turn(BaseModel):
    role: str
    content: str
    name: str | None = None


@dataclasses.dataclass
class Line:
    role: str
    content: str


def part(text, **more):
    return {"type": "text", "text": text, **more}


SYSTEM = {"role": "system", "content": "Shout."}
MARK = {"cache_control": {"type": "ephemeral"}}
FORMS = {
    "dicts": lambda text: [SYSTEM, {"role": "user", "content": text}],
    "a tuple": lambda text: (SYSTEM, {"role": "user", "content": text}),
    "a deque": lambda text: deque([SYSTEM, {"role": "user", "content": text}]),
    "dataclasses": lambda text: [Line("system", "Shout."), Line("user", text)],
    "other order": lambda text: [{"content": "Shout.", "role": "system"}, {"content": text, "role": "user"}],
    "ordered": lambda text: [OrderedDict(SYSTEM), OrderedDict(role="user", content=text)],
    "default": lambda text: [defaultdict(str, SYSTEM), defaultdict(str, role="user", content=text)],
    "mappings": lambda text: [
        types.MappingProxyType(SYSTEM),
        types.MappingProxyType({"role": "user", "content": text}),
    ],
    "Message": lambda text: [mb.Message("system", "Shout."), mb.Message("user", text)],
    "Message of texts": lambda text: [mb.Message("system", Text("Shout.")), mb.Message(Text("user"), Text(text))],
    "texts": lambda text: [
        {"role": Text("system"), "content": Text("Shout.")},
        {"role": "user", "content": Text(text)},
    ],
    "enums": lambda text: [{"role": "system", "content": Word.SYSTEM}, {"role": "user", "content": text}],
    "old enums": lambda text: [{"role": "system", "content": Old.SYSTEM}, {"role": "user", "content": text}],
    "numpy": lambda text: [SYSTEM, {"role": "user", "content": np.array([text])[0]}],
    "nulls": lambda text: [
        {**SYSTEM, "name": None, "refusal": None},
        {"role": "user", "content": text, "name": None, "tool_calls": [], "function_call": None, "audio": None},
    ],
    "parts": lambda text: [{"role": "system", "content": [part("Shout.")]}, {"role": "user", "content": [part(text)]}],
    "a marked part": lambda text: [SYSTEM, {"role": "user", "content": [part(text, **MARK)]}],
    "a part with nulls": lambda text: [SYSTEM, {"role": "user", "content": [part(text, annotations=None)]}],
    "models": lambda text: [Turn(role="system", content="Shout."), Turn(role="user", content=text)],
}


async def test_all_forms_of_a_text_share_a_prompt():
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=0.1, max_batch_size=50) as batcher:
        replies = await asyncio.gather(*(batcher.submit(form(name)) for name, form in FORMS.items()))
        assert batcher.stats().alone_by_field == {}
    assert [reply.output for reply in replies] == [name.upper() for name in FORMS]
    (call,) = transport.calls
    assert call.call.messages[0] == SYSTEM


@each("name", FORMS)
async def test_alone_the_own_messages_are_sent_as_given(name):
    transport = ScriptedTransport()
    async with batcher_for(transport) as batcher:
        assert (await batcher.submit(FORMS[name]("one"))).output == "ONE"
    assert transport.calls[0].call.messages == copy_of(FORMS[name]("one"))


@each("name", FORMS)
async def test_a_cache_finds_the_answer_again(name):
    async with batcher_for(ScriptedTransport(), mb.MemoryCache()) as batcher:
        await batcher.submit(FORMS[name]("one"))
        assert (await batcher.submit(FORMS[name]("one"))).route == "cache"
        assert [result.unwrap().route async for result in batcher.map([FORMS[name]("one")])] == ["cache"]


@each("name", FORMS)
def test_a_spool_keeps_the_messages_as_given(name):
    payload = Payload.of(FORMS[name]("one"), max_tokens=np.int64(5), model=Text("m"), params={"user": Text("u")})
    kept = Payload.decode(payload.encode())
    assert (kept.messages, kept.model, kept.max_tokens) == (copy_of(FORMS[name]("one")), "m", 5)


async def test_later_changes_of_the_callers_objects_do_not_reach_what_waits():
    transport, given = ScriptedTransport(), FORMS["parts"]("one")
    async with batcher_for(transport, idle="wait", max_wait=0.1) as batcher:
        asking = asyncio.ensure_future(batcher.submit(given))
        await asyncio.sleep(0)
        given[0]["content"][0]["text"] = given[1]["content"][0]["text"] = "other"
        await asking
    assert transport.calls[0].call.messages == FORMS["parts"]("one")


async def test_marks_for_the_providers_cache_stay_in_the_shared_messages():
    transport = ScriptedTransport()
    shared = {"role": "system", "content": [part("Shout.", **MARK)]}
    async with batcher_for(transport, idle="wait", max_wait=0.1) as batcher:
        await asyncio.gather(*(batcher.submit([shared, {"role": "user", "content": text}]) for text in "ab"))
    (call,) = transport.calls
    assert call.combined
    assert call.call.messages[0] == shared


async def test_messages_of_the_sdk_are_turns_of_the_conversation():
    transport = ScriptedTransport()
    turns = [
        ChatCompletionMessage(role="assistant", content="Yes?"),
        ChatCompletionMessage.construct(role="assistant", content="Yes?", refusal=None, annotations=[]),
        ParsedChatCompletionMessage[int](role="assistant", content="Yes?", parsed=5),
        {"role": "assistant", "content": "Yes?"},
    ]
    async with batcher_for(transport, idle="wait", max_wait=0.1) as batcher:
        asking = [
            batcher.submit([{"role": "user", "content": "Hi."}, turn, {"role": "user", "content": str(number)}])
            for number, turn in enumerate(turns)
        ]
        await asyncio.gather(*asking)
    (call,) = transport.calls
    assert call.call.messages[1] == {"role": "assistant", "content": "Yes?"}


MORE = [
    (
        [{"role": "user", "content": [part("x"), {"type": "image_url", "image_url": {"url": "data:,"}}]}],
        "messages: image part",
    ),
    ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "messages: audio part"),
    ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "messages: file part"),
    ([{"role": "user", "content": [{"type": "made up", "text": "x"}]}], "messages: another part"),
    ([{"role": "user", "content": [part("x", citations=[1])]}], "messages: another part"),
    ([{"role": "user", "content": ["x"]}], "messages: another part"),
    ([{"role": "user", "content": 5}], "messages: content is no text"),
    ([{"role": "user", "content": "x", "name": "ann"}], "messages: name"),
    ([{"role": "user", "content": "x", "made_up": 1}], "messages: another field"),
    ([{"role": "assistant", "content": "x"}], "last message is not the user's"),
    (
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, {"role": "user", "content": "x"}],
        "messages: tool_calls",
    ),
    (
        [{"role": "tool", "content": "x", "tool_call_id": "1"}, {"role": "user", "content": "x"}],
        "messages: tool_call_id",
    ),
]


@each("messages, reason", MORE)
async def test_what_is_more_than_texts_goes_alone_unchanged_and_is_counted(messages, reason):
    transport = ScriptedTransport(answer=lambda _: "ok")
    async with batcher_for(transport, idle="wait", max_wait=0.1) as batcher:
        await asyncio.gather(*(batcher.submit(messages) for _ in range(2)))
        assert batcher.stats().alone_by_field == {reason: 2}
    assert [call.call.messages for call in transport.calls] == [messages, messages]


@each(
    "messages",
    [
        [5],
        [{"content": "x"}],
        [{"role": 1, "content": "x"}],
        [Turn],
        [object()],
        ["x"],
        [{"role": "user", "content": {1j}}],
    ],
)
async def test_what_is_no_message_is_refused(messages):
    async with batcher_for(ScriptedTransport()) as batcher:
        with pytest.raises(mb.ConfigError, match="messages"):
            await batcher.submit(messages)


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_parts_are_joined_as_servers_join_them(texts):
    parts = [{"role": "user", "content": [part(text) for text in texts]}]
    assert as_texts(parts) == [{"role": "user", "content": "\n".join(texts)}]
    read = read_messages(parts, PLAIN)
    assert isinstance(read, str) or read[1] == "\n".join(texts)


async def test_what_is_equal_in_python_but_not_in_json_is_kept_apart():
    transport = ScriptedTransport()
    given = [
        [{**SYSTEM, "cache_control": {"ttl": value}}, {"role": "user", "content": "x"}] for value in (1, True, 1.0)
    ]
    async with batcher_for(transport) as batcher:
        for messages in given:
            await batcher.submit(messages)
    assert [repr(call.call.messages) for call in transport.calls] == [repr(messages) for messages in given]
