"""Which request parameters are combined, and what is told about those that are not."""

from __future__ import annotations

import asyncio
import logging

import msgspec
import numpy as np
import pytest
from helpers import ask, batcher_for, each, submit_all

import microbatch as mb
from microbatch.accounting.stats import OTHER_FIELDS
from microbatch.openai.chat_completion import submit_arguments
from microbatch.spool.payload import Payload
from microbatch.spool.provider.input_file import read
from microbatch.spool.records import Delivery, Name
from microbatch.testing import ScriptedTransport

TEXTS = ("one", "two", "three")


async def asked(params, **options):
    """Return how a few requests with *params* left: the transport, the figures, and the replies."""
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=0.1, **options) as batcher:
        replies = await submit_all(batcher, TEXTS, params=params)
        return transport, batcher.stats(), replies


HARMLESS = [
    {"reasoning_effort": "low"},
    {"thinking": {"type": "disabled"}, "enable_thinking": False},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"provider": {"order": ["a"]}, "top_k": 20, "min_p": 0.05, "top_p": 0.9},
    {"service_tier": "flex", "safety_settings": [], "store": True, "user": "ann", "metadata": {"a": "b"}},
    {"extra_body": {"top_k": 5}},
    {"extra_body": {"extra_body": {"google": {"thinking_config": {"thinking_budget": 0}}}}},
]
WHOLE_REPLY = [
    ({"guided_choice": ["yes", "no"]}, "guided_choice"),
    ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs"),
    ({"regex": "yes|no"}, "regex"),
    ({"grammar": "root ::= x"}, "grammar"),
    ({"json_schema": {}, "best_of": 2}, "best_of"),
    ({"min_tokens": 5}, "min_tokens"),
    ({"ignore_eos": True}, "ignore_eos"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": -1}, "presence_penalty"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"seed": 7}, "seed"),
    ({"stop": "\n"}, "stop"),
    ({"a_field_of_tomorrow": False}, "a_field_of_tomorrow"),
    ({"extra_body": {"guided_json": {"type": "object"}}}, "guided_json"),
    ({"extra_body": {"extra_body": {"google": {"stop": ["x"]}}}}, "stop"),
]
NOTHING = {"stop": [], "tools": [], "logit_bias": {}, "seed": None, "n": 1, "logprobs": False, "frequency_penalty": 0}


@each("params", HARMLESS)
async def test_what_acts_on_each_answer_alike_is_combined(params):
    transport, stats, _ = await asked(params)
    assert [call.combined for call in transport.calls] == [True]
    assert stats.alone_by_field == {}


@each("params, field", WHOLE_REPLY)
async def test_what_acts_on_a_reply_as_a_whole_or_is_unknown_goes_alone_and_is_counted(params, field):
    transport, stats, _ = await asked(params)
    assert [call.combined for call in transport.calls] == [False] * 3
    assert stats.alone_by_field[field] == 3


async def test_what_goes_alone_is_sent_unchanged():
    params = {"seed": 7, "stop": [], "tools": None}
    transport, _, _ = await asked(params)
    assert [call.call.params for call in transport.calls] == [params] * 3


async def test_fields_that_say_nothing_make_no_difference():
    transport = ScriptedTransport()
    async with batcher_for(transport, idle="wait", max_wait=0.1) as batcher:
        asking = [
            batcher.submit(ask(text), params=params) for text, params in zip(TEXTS, (None, {}, NOTHING), strict=True)
        ]
        await asyncio.gather(*asking)
    (call,) = transport.calls
    assert call.combined
    assert call.call.params == {}


async def test_further_parameters_are_combined_on_request():
    transport, stats, _ = await asked({"seed": 7}, combine_params=["seed"])
    assert [call.combined for call in transport.calls] == [True]
    assert transport.calls[0].call.params == {"seed": 7}
    assert stats.alone_by_field == {}


def test_provider_batches_combine_the_same():
    for params, line in (({"seed": 7}, b""), ({"top_k": 7}, b'"one"')):
        item = Payload.of(ask("one"), params=params).item(Name(None, "id"))
        assert read(Delivery(item, "token", 1, 0.0)).line == line
        assert read(Delivery(item, "token", 1, 0.0), {"seed", "top_k"}).line == b'"one"'


async def test_the_fields_of_an_extra_body_take_precedence_as_in_the_sdk():
    transport, _, _ = await asked({"top_k": 1, "extra_body": {"top_k": 5, "min_p": 0.1}})
    assert transport.calls[0].call.params == {"top_k": 5, "min_p": 0.1}


def test_a_field_extra_body_in_a_body_is_kept_as_it_is():
    # Gemini's compatible endpoint has a field of this name: https://ai.google.dev/gemini-api/docs/openai.
    body = {"messages": ask("x"), "extra_body": {"google": {"cached_content": "c"}}}
    assert submit_arguments(body)["params"] == {"extra_body": {"extra_body": body["extra_body"]}}


@each(
    "params, words",
    [
        ({"top_p": float("nan")}, "params must be JSON values"),
        ({"metadata": {"a": [float("inf")]}}, "params must be JSON values"),
        ({"top_p": object()}, "params must be JSON values"),
        ({1: 2}, "params must be a mapping of request fields"),
        ({"extra_body": [1]}, "extra_body must be a mapping"),
        ({"extra_body": {"model": "x"}}, "params: model: submit"),
        ({"extra_headers": {"a": "b"}}, "use headers="),
        ({"extra_query": {"a": "b"}}, "use OpenAIChat"),
    ],
)
async def test_params_that_no_body_can_carry_are_refused(params, words):
    async with batcher_for(ScriptedTransport()) as batcher:
        with pytest.raises(mb.ConfigError, match=words):
            await batcher.submit(ask("x"), params=params)


class Text(str):
    __slots__ = ()


async def test_numbers_and_texts_of_other_classes_are_taken_for_what_they_are():
    transport = ScriptedTransport()
    usual = {"params": {"top_p": 0.5, "user": "u"}, "temperature": 0.5, "max_tokens": 5, "model": "m", "tenant": "t"}
    odd = {
        "params": {"top_p": np.float32(0.5), "user": Text("u")},
        "temperature": np.float64(0.5),
        "max_tokens": np.int64(5),
        "model": Text("m"),
        "tenant": Text("t"),
    }
    async with batcher_for(transport, idle="wait", max_wait=0.1, prices={"m": mb.Price(1, 1)}) as batcher:
        asking = (batcher.submit(ask("a"), **usual), batcher.submit(ask("b"), **odd, timeout=np.float32(30)))
        replies = await asyncio.gather(*asking)
    assert [reply.output for reply in replies] == ["A", "B"]
    (call,) = transport.calls
    assert type(replies[1].latency) is float
    assert msgspec.json.encode(call.call.params) == b'{"top_p":0.5,"user":"u","temperature":0.5}'


async def test_what_keeps_requests_alone_is_told_once(caplog):
    caplog.set_level(logging.WARNING, "microbatch")
    await asked({"seed": 7, "stop": "x"})
    assert len(caplog.records) == 2
    for field, record in zip(("seed", "stop"), caplog.records, strict=True):
        assert f"this: {field};" in record.getMessage()


async def test_names_that_callers_make_up_do_not_pile_up():
    async with batcher_for(ScriptedTransport()) as batcher:
        for number in range(70):
            await batcher.submit(ask("x"), params={f"field{number}": 1})
        await batcher.submit(ask("x"), params={"no field\n": 1})
        counts = batcher.stats().alone_by_field
    assert len(counts) == 65
    assert counts[OTHER_FIELDS] == 7
