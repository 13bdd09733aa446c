"""How many tokens an answer is expected to take by its schema, and what is known of models by their names."""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Annotated, Literal

import msgspec
import pytest
from helpers import each

from microbatch.batching.bounds import asked_reasoning, output_limit, reasoning_budget, reasons_by_name
from microbatch.schema.answer_type import answer_type
from microbatch.schema.expected import expected_tokens
from microbatch.testing.counting import compact, text_tokens


class Item(msgspec.Struct):
    category: Literal["electronics", "home and garden"]
    score: float
    checked: bool
    tags: Annotated[list[Literal["new", "sale"]], msgspec.Meta(max_length=3)]
    code: Annotated[str, msgspec.Meta(max_length=12)]


class Node(msgspec.Struct):
    name: Literal["a"]
    inner: Node | None = None


FINITE = [
    (Literal["electronics", "home and garden"], "home and garden"),
    (Literal[1, 2, 30], 30),
    (bool, False),
    (int, -1_234_567_890),
    (float, 3.141592653589793),
    (uuid.UUID, "123e4567-e89b-12d3-a456-426614174000"),
    (dt.date, "2026-11-30"),
    (Annotated[str, msgspec.Meta(max_length=20)], "\u7535\u5b50\u4ea7\u54c1" * 5),
    (tuple[int, bool], [123_456, True]),
    (Literal["a", "b"] | None, None),
    (Item, {"category": "home and garden", "score": 0.123456789, "checked": True, "tags": ["new"] * 3, "code": "a1b2c3d4e5f6"}),
]  # fmt: skip


@each(("output_type", "longest"), FINITE)
@each("indent", [None, 4])
def test_three_times_what_is_expected_is_enough_for_the_longest_answer(output_type, longest, indent):
    expected = answer_type(output_type).expected_tokens
    assert expected is not None
    element = {"results": [{"id": "12kfqzt", "answer": longest}]}
    frame = text_tokens(compact({"results": [{"id": "12kfqzt", "answer": 0}]}, indent))
    assert text_tokens(compact(element, indent)) - frame <= 3 * expected
    assert expected <= 8 * text_tokens(compact(longest)), "and it is no wild guess"


@pytest.mark.parametrize(
    "output_type", [str, list[int], dict[str, int], Node, Annotated[str, msgspec.Meta(max_length=100_000)]]
)
def test_what_may_be_of_any_length_is_not_told_by_its_schema(output_type):
    assert answer_type(output_type).expected_tokens is None


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"type": "object", "properties": {"a": True}},
        {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": True},
        {"type": "array", "maxItems": 3},
        {"$ref": "#/$defs/nowhere"},
        {"$ref": "https://example.org/schema"},
        {"allOf": [{"type": "boolean"}]},
        {"type": ["string", "null"]},
        {"anyOf": [{"type": "boolean"}, {"type": "string"}]},
    ],
)
def test_schemas_that_do_not_tell(schema):
    assert expected_tokens(schema) is None


def test_a_schema_whose_references_stand_for_millions_of_parts_does_not_tell():
    doubling = {
        f"d{level}": {"type": "object", "properties": {key: {"$ref": f"#/$defs/d{level + 1}"} for key in "abcdefgh"}}
        for level in range(12)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": {**doubling, "d12": {"type": "boolean"}}}
    assert expected_tokens(schema) is None
    assert expected_tokens({"type": "array", "maxItems": 2, "items": {"$ref": "#"}}) is None


@each(
    "name",
    ["o1", "o3-mini-2025-01-31", "o4-mini", "gpt-5-mini", "openai/gpt-oss-20b", "deepseek-reasoner", "deepseek-ai/DeepSeek-R1",
     "DeepSeek-R1-Distill-Qwen-7B", "QwQ-32B", "Qwen/Qwen3-8B", "Qwen3-30B-A3B-Thinking-2507", "gemini-2.5-flash", "grok-4",
     "kimi-k2-thinking", "glm-4.6", "magistral-small-2509", "phi-4-reasoning", "sonar-reasoning-pro"],
)  # fmt: skip
def test_models_that_reason_are_known_by_name(name):
    assert reasons_by_name(name)


@each(
    "name",
    [None, "gpt-4o", "gpt-4.1-mini", "gpt-5-chat-latest", "deepseek-chat", "Qwen3-30B-A3B-Instruct-2507", "qwen3-coder",
     "gemini-2.0-flash", "grok-4-fast-non-reasoning", "claude-sonnet-4-5", "llama-3.3-70b", "mistral-large", "simulated", "o200k"],
)  # fmt: skip
def test_models_that_do_not_reason_are_not_taken_for_it(name):
    assert not reasons_by_name(name)


@pytest.mark.parametrize(
    ("params", "asked", "budget"),
    [
        ({}, None, 0),
        ({"temperature": 0, "max_tokens": 30_000}, None, 0),
        ({"reasoning_effort": "low"}, True, 0),
        ({"reasoning_effort": "none"}, False, 0),
        ({"thinking": {"type": "enabled", "budget_tokens": 20_000}}, True, 20_000),
        ({"thinking": {"type": "disabled"}}, False, 0),
        ({"reasoning": {"effort": "high"}}, True, 0),
        ({"reasoning": {"enabled": False}}, False, 0),
        ({"reasoning": {"max_tokens": 30_000}}, True, 30_000),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True, 0),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False, 0),
        ({"enable_thinking": True, "thinking_budget": 24_000}, True, 24_000),
    ],
)
def test_parameters_that_ask_for_reasoning(params, asked, budget):
    assert asked_reasoning(params) is asked
    assert reasoning_budget(params) == budget


@pytest.mark.parametrize(
    ("name", "limit"),
    [("gpt-4o", 16_384), ("gpt-4o-2024-05-13", 4_096), ("gpt-4", 8_192), ("gpt-4-turbo", 4_096), ("gpt-4.1-mini", 32_768),
     ("anthropic/claude-3.5-sonnet", 8_192), ("claude-3-haiku-20240307", 4_096), ("deepseek-chat", 8_192),
     ("simulated", None), (None, None)],
)  # fmt: skip
def test_output_limits_that_are_known_by_name(name, limit):
    assert output_limit(name) == limit
