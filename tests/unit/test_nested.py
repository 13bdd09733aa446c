"""A combined prompt that arrives where requests are combined, from another process or another layer, goes alone."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import pytest
from helpers import ask, batcher_for
from hypothesis import given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.batching.request import PLAIN, own_text, read_messages
from microbatch.messages import Message
from microbatch.openai import AsyncOpenAI
from microbatch.prompt.compose import compose, instruction, is_combined, item_line
from microbatch.prompt.ids import IdKey
from microbatch.schema.answer_type import answer_type
from microbatch.spool.payload import Payload
from microbatch.spool.provider.input_file import read
from microbatch.spool.records import Delivery, Name
from microbatch.testing import ScriptedTransport

Label = Literal["a", "b"]
SYSTEM = {"role": "system", "content": "Shout."}


async def composed(*script, texts=("one", "two", "three", "four"), output_type=str, **options):
    """The messages of each combined call that a batcher makes."""
    transport = ScriptedTransport(*script, answer=lambda _: "a")
    policy = mb.FlushPolicy(idle="wait", max_batch_size=4)
    async with mb.Microbatcher(transport, policy=policy, tokens="bytes", **options) as batcher:
        await asyncio.gather(*(batcher.submit(ask(text), output_type=output_type) for text in texts))
    return [call.call.messages for call in transport.calls if call.combined]


def little(received):
    return received.reply([(received.items[0][0], "a")])


async def prompts():
    """Combined prompts of every kind: of texts, of typed answers, asked again, with a canary, of texts that are odd."""
    asked_again = await composed(little)
    assert len(asked_again) > 1
    return [
        *asked_again,  # the first of them is the prompt of a batch
        *await composed(output_type=Label),
        *await composed(fallback=mb.FallbackPolicy(canary=True)),
        *await composed(texts=('"', "é\u2028\n", "[1abcde]", "x" * 3000)),
    ]


def instructions(messages):
    """How often the instruction stands in a prompt, as such or in one of its lines."""
    start = "Below are separate requests, one a line: an id in brackets"
    return sum(str(message["content"]).count(start) for message in messages)


async def through(ask_all):
    """Hand every prompt, and ordinary requests like it, to one batcher; return its transport, its figures and what it answered."""
    nested = await prompts()
    transport = ScriptedTransport(answer=lambda text: f"re: {text}")
    async with batcher_for(transport, idle="wait", share=True) as batcher:
        answers = await ask_all(batcher, nested)
        stats = batcher.stats()
    assert sorted(instructions(call.call.messages) for call in transport.calls) == [1] * (len(nested) + 1)
    assert stats.singles_by_reason["not_combinable"] == len(nested)
    assert (stats.batches, stats.batch_size_mean) == (1, 3)
    assert answers[-3:] == ["re: x", "re: y", "re: z"]
    return nested, transport, answers


OTHERS = [ask(text) for text in "xyz"]


@pytest.mark.parametrize("form", ["dict", "Message"])
async def test_through_submit_it_goes_alone_as_it_is(form):
    def shaped(messages):
        return messages if form == "dict" else [Message(**message) for message in messages]

    async def ask_all(batcher, nested):
        asked = [shaped(messages) for messages in nested] + OTHERS
        return [reply.text for reply in await asyncio.gather(*map(batcher.submit, asked))]

    nested, transport, _ = await through(ask_all)
    sent = [call.call.messages for call in transport.calls]
    assert all(list(messages) in sent for messages in nested)


async def test_through_map_it_goes_alone():
    async def ask_all(batcher, nested):
        asked = [list(messages) for messages in nested] + OTHERS
        return [result.unwrap().text async for result in batcher.map(asked, ordered=True)]

    await through(ask_all)


async def test_through_the_sdks_calls_it_goes_alone():
    async def ask_all(batcher, nested):
        create = AsyncOpenAI(batcher).chat.completions.create
        asked = [create(messages=messages) for messages in [*nested, *OTHERS]]
        return [completion.choices[0].message.content for completion in await asyncio.gather(*asked)]

    await through(ask_all)


async def test_a_prompt_in_text_parts_goes_alone():
    async def ask_all(batcher, nested):
        asked = [
            [*messages[:-1], {"role": "user", "content": [{"type": "text", "text": messages[-1]["content"]}]}]
            for messages in nested
        ]
        return [reply.text for reply in await asyncio.gather(*map(batcher.submit, [*asked, *OTHERS]))]

    await through(ask_all)


async def test_a_combined_prompt_in_the_spool_becomes_a_line_of_its_own():
    def shared(messages):
        item = Payload.of(list(messages)).item(Name(None, "id"))
        return read(Delivery(item, 1, "lease", 0.0)).key

    assert [shared(messages) for messages in await prompts()] == [None] * len(await prompts())
    assert shared(ask("x")) is not None


@given(st.text(), st.text(), st.lists(st.text(min_size=1), min_size=1), st.sampled_from([str, Label, int]))
def test_it_is_recognised_whatever_a_proxy_has_put_around_it(before, after, texts, output_type):
    words = instruction(answer_type(output_type).words)
    prompt, _ = compose(
        words, [item_line(text.encode("utf-8", "replace").decode()) for text in texts], IdKey().draws(b"batch")
    )
    for seen in (prompt, prompt.strip(), before + prompt + after, prompt.replace("\n", "\r\n")):
        messages = [SYSTEM, {"role": "user", "content": seen}]
        assert is_combined(seen)
        assert read_messages(messages, PLAIN) == "messages: a combined prompt"
        assert own_text(messages, [SYSTEM]) is None  # the short cut of requests that come one after another


async def test_a_text_that_quotes_the_instruction_is_answered():
    quoting = f"What does this mean? {instruction('Each answer is a JSON string.')}"
    async with batcher_for(ScriptedTransport(answer=lambda _: "a format"), idle="wait") as batcher:
        replies = await asyncio.gather(*(batcher.submit(ask(text)) for text in (quoting, "x", quoting, "y")))
        stats = batcher.stats()
    assert [reply.output for reply in replies] == ["a format"] * 4
    assert (stats.singles_by_reason["not_combinable"], stats.batch_size_mean) == (2, 2)


@given(st.text(), st.dictionaries(st.text(), st.text()))
def test_other_texts_are_none(text, members):
    assert not is_combined(text)
    assert not is_combined(json.dumps({"results": [{"id": "1", "answer": members}]}))
    assert not is_combined('Reply with {"results": [{"id": "...", "answer": ...}]}')
