"""Programs written with well-known frameworks get their own answers from combined calls, with nothing changed but the address.

Each case has 16 concurrent callers. The frameworks are those of the extra `frameworks`; what is not installed is skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from callers import CASES, KEY
from cities import MODEL, TEXT, TYPED, City, is_right
from table import AI_SDK, CLIENT, GATEWAY, NO_ANSWER, WRITE, cell, documented
from tool_endpoint import ToolEndpoint

import microbatch as mb
from microbatch.gateway import Gateway
from microbatch.openai import AsyncOpenAI

# What the frameworks themselves warn of is theirs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CALLERS = 16
MOST_CALLS = 3
PATIENCE = 120

SCRIPT = Path(__file__).parent / "ai_sdk.mjs"
AI_SDK_MODES = re.findall(r"^  '(.+?)': async", SCRIPT.read_text(), re.MULTILINE)
AI_SDK_NEEDS = "needs Node.js, and MICROBATCH_NODE_MODULES: where ai, @ai-sdk/openai, @ai-sdk/openai-compatible and zod are installed"

RELAYED = "a stream, relayed at once"

NOT_COMBINED = {
    GATEWAY: {
        "langchain-openai text parts": "text in parts",
    },
    CLIENT: {
        "openai create(stream)": RELAYED,
        "openai tools, named, stream": RELAYED,
        "instructor create_partial, TOOLS": RELAYED,
        "langchain-openai astream": RELAYED,
        "langchain-openai function_calling, astream": RELAYED,
    },
}
"""Cases in which each caller gets the right answer, but by a call of its own, and why."""

RAW = "no with_raw_response"
NOT_GIVEN = "NOT_GIVEN is refused as a timeout"
KEYS = "no api_key, no with_raw_response"

BROKEN = {
    GATEWAY: {},
    CLIENT: {
        "openai parse, strict tool": "parse() needs a response_format",
        "langchain-openai ainvoke": RAW,
        "langchain-openai text parts": RAW,
        "langchain-openai json_schema": RAW,
        "langchain-openai function_calling": RAW,
        "langchain-openai json_mode": RAW,
        "pydantic-ai str": NOT_GIVEN,
        "pydantic-ai output_type": NOT_GIVEN,
        "pydantic-ai NativeOutput": NOT_GIVEN,
        "pydantic-ai PromptedOutput": NOT_GIVEN,
        "pydantic-ai run_stream": NOT_GIVEN,
        "pydantic-ai run_stream, output_type": NOT_GIVEN,
        "litellm acompletion": KEYS,
        "litellm stream": KEYS,
        "litellm response_format": KEYS,
        "litellm tools": KEYS,
    },
}
"""Cases in which callers get no answer, and why."""

POLICY = mb.FlushPolicy(idle="wait", max_wait=1.0, max_batch_size=CALLERS)


@asynccontextmanager
async def gateway():
    """Yield an endpoint and a gateway in front of it."""
    async with ToolEndpoint() as endpoint, Gateway(endpoint.base_url, policy=POLICY, tokens="bytes") as served:
        yield endpoint, served


def check(record, endpoint, name, through, answers, kind):
    """Record how the answers to questions 0, 1, 2, ... and the calls for them came out, and fail unless both are as promised.

    What is known to fall short is an expected failure; once it does not, it fails here, so that it is taken out of the tables above.
    """
    framework, _, mode = name.partition(" ")
    right = sum(is_right(answer, number, kind) for number, answer in enumerate(answers))
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    record(framework, mode, through, right, endpoint.calls, type(errors[0]).__name__ if errors else "")
    if WRITE not in os.environ:
        compare(documented().get((framework, mode, through)), cell(right, endpoint.calls))
    if why := BROKEN[through].get(name):
        assert right == 0
        pytest.xfail(why)
    if errors:
        raise errors[0]
    assert right == CALLERS
    if why := NOT_COMBINED[through].get(name):
        assert endpoint.calls > MOST_CALLS
        pytest.xfail(why)
    assert endpoint.calls <= MOST_CALLS


def compare(said, found):
    """Fail if the documentation's table says otherwise: no answer, or many calls where it has few, or none of the case."""
    assert said is not None, f"the table lacks it; set {WRITE}=1 to write the table anew"
    assert (said == NO_ANSWER) == (found == NO_ANSWER)
    assert said == NO_ANSWER or (int(said) <= MOST_CALLS) == (int(found) <= MOST_CALLS)


every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])


def need(case):
    for name in case.needs:
        pytest.importorskip(name, reason=f"needs {name}: pip install 'microbatch[frameworks]'", exc_type=ImportError)


async def ask_all(ask):
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*map(ask, range(CALLERS)), return_exceptions=True)


@every_case
async def test_a_framework_is_combined_by_the_gateway(case, record):
    need(case)
    import openai

    async with (
        gateway() as (endpoint, served),
        openai.AsyncOpenAI(base_url=served.base_url, api_key=KEY, max_retries=0) as client,
    ):
        answers = await ask_all(case.make(client, served.base_url, False))
        check(record, endpoint, case.name, GATEWAY, answers, case.answers)


@every_case
async def test_a_framework_is_combined_by_a_client_of_ours(case, record):
    need(case)
    async with ToolEndpoint() as endpoint:
        transport = mb.OpenAIChat(MODEL, base_url=endpoint.base_url, api_key=KEY)
        async with AsyncOpenAI(mb.Microbatcher(transport, policy=POLICY, tokens="bytes")) as client:
            answers = await ask_all(case.make(client, endpoint.base_url, True))
        check(record, endpoint, case.name, CLIENT, answers, case.answers)


@pytest.mark.parametrize("mode", AI_SDK_MODES)
async def test_the_ai_sdk_is_combined_by_the_gateway(mode, record):
    node, folder = shutil.which("node"), os.environ.get("MICROBATCH_NODE_MODULES")
    if node is None or not folder:
        pytest.skip(AI_SDK_NEEDS)
    async with gateway() as (endpoint, served):
        process = await asyncio.create_subprocess_exec(
            *(node, str(SCRIPT), mode, served.base_url, *map(str, range(CALLERS))),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(PATIENCE):
            out, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
        answers = json.loads(out)
        kind = TEXT if isinstance(answers[0], str) else TYPED
        answers = answers if kind == TEXT else [City.model_validate(answer) for answer in answers]
        check(record, endpoint, f"{AI_SDK} {mode}", GATEWAY, answers, kind)
