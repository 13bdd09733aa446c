"""The simulated model where requests limit their answers to few tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import microbatch as mb
from microbatch.testing import SimulatedModel, SimulatedTransport
from microbatch.testing.answers import simulated_answer
from microbatch.testing.counting import compact, text_tokens

TEXT = "Read the product, a large green garden chair of solid oak with two cushions, and answer. " * 3
PARTS = {"why": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2}}
SCHEMA = {"type": "object", "properties": PARTS, "required": ["why", "tags"], "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize("schema", [None, {"type": "string"}, {"type": "array", "items": {"type": "string"}}, SCHEMA])
@pytest.mark.parametrize("most", [20, 30, 60, 100])
def test_an_answer_keeps_to_its_limit_and_is_as_long_as_ever_where_that_allows_it(schema, most):
    answer = simulated_answer(TEXT, schema, max_tokens=most)
    assert 0 < text_tokens(answer if isinstance(answer, str) else compact(answer)) <= most
    assert simulated_answer(TEXT, schema, max_tokens=10_000) == simulated_answer(TEXT, schema)


def test_what_the_schema_wants_is_not_shortened():
    answer = simulated_answer(TEXT, {"type": "string", "minLength": 200}, max_tokens=5)
    assert len(answer) >= 200


def messages(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Answer in JSON. " * 9},
        {"role": "user", "content": f"{TEXT} {number * 7919}"},
    ]


async def told(model: SimulatedModel, count: int, **options: Any) -> tuple[list[Any], mb.Stats]:
    """Return the answers to *count* questions, and the figures."""
    async with mb.Microbatcher(SimulatedTransport(model)) as batcher:
        replies = await asyncio.gather(*(batcher.submit(messages(number), **options) for number in range(count)))
        return [(reply.output, reply.finish_reason) for reply in replies], batcher.stats()


@pytest.mark.parametrize(
    ("most", "params"),
    [
        (5, None),
        (10, None),
        (48, None),
        (20, {"response_format": {"type": "json_object"}}),
        (60, {"response_format": FORM}),
    ],
)
async def test_short_answers_are_the_same_alone_and_together_and_none_is_cut(most, params):
    together, stats = await told(SimulatedModel(brief=True), 32, max_tokens=most, params=params)
    alone, _ = await told(SimulatedModel(brief=True), 1, max_tokens=most, params=params)
    assert together[0] == alone[0]
    assert {finish_reason for _, finish_reason in together} == {"stop"}
    assert (stats.fallback_calls, stats.cut_replies) == (0, 0)
    assert stats.upstream_calls <= 5


async def test_otherwise_the_limit_cuts():
    for model in (SimulatedModel(), SimulatedModel(brief=True, answer=lambda *_: "word " * 99)):
        alone, _ = await told(model, 1, max_tokens=5)
        assert alone[0][1] == "length"
