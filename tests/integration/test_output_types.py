"""Output types as users write them, asked for alone and combined of an endpoint that is as strict as OpenAI's strict mode."""

from __future__ import annotations

import asyncio
import json

import pytest
from many_types import CASES
from strict_rules import violations

import microbatch as mb
from microbatch.testing import SimulatedEndpoint

pytestmark = pytest.mark.slow


def ask(number: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Extract."}, {"role": "user", "content": f"text {number}"}]


def test_there_are_enough_types_to_say_so():
    assert len(CASES) >= 150


@pytest.mark.parametrize(("output_type", "answers"), CASES, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(CASES)])
async def test_a_type_is_asked_for_as_strict_mode_allows_and_read_right_alone_and_combined(output_type, answers):
    def answer(text: str, schema: object) -> object:
        return answers[int(text.rsplit(maxsplit=1)[-1]) % len(answers)][0]

    async with SimulatedEndpoint(answer=answer, record=True) as endpoint:
        chat = mb.OpenAIChat("m", base_url=endpoint.base_url, api_key="k")
        policy = mb.FlushPolicy(idle="wait", max_wait=0.02)
        async with mb.Microbatcher(chat, policy=policy) as batcher:
            size = 3 * len(answers)
            together = await asyncio.gather(*(batcher.submit(ask(n), output_type=output_type) for n in range(size)))
            alone = [await batcher.submit(ask(n), output_type=output_type) for n in range(len(answers))]
    assert [reply.route for reply in (*together, *alone)] == ["batch"] * size + ["single"] * len(answers)
    for number, reply in enumerate((*together, *alone)):
        sent, read = answers[(number if number < size else number - size) % len(answers)]
        assert reply.output == read
        assert type(reply.output) is type(read)
        if output_type is not str:
            assert json.loads(reply.text) == sent
    assert len(endpoint.requests) == 1 + len(answers)  # nothing was refused, nothing asked twice
    for body in endpoint.requests:
        if "response_format" in body:
            form = body["response_format"]["json_schema"]
            assert form["strict"] is False or violations(form["schema"]) == []
        else:
            assert output_type is str
