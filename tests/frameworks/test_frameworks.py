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
from cities import EMBEDDER, MODEL, TEXT, TYPED, City, is_right, question, right_vector
from table import AI_SDK, CLIENT, GATEWAY, MOST_CALLS, NO_ANSWER, NOT_MEASURED, WRITE, cell, documented
from tool_endpoint import ToolEndpoint

import microbatch as mb
from microbatch.accounting.tokens import load_encoding
from microbatch.gateway import Gateway
from microbatch.openai import AsyncOpenAI

# Warnings of the frameworks about themselves are no failures here.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CALLERS = 16
PATIENCE = 120

SCRIPT = Path(__file__).parent / "ai_sdk.mjs"
AI_SDK_MODES = re.findall(r"^  '(.+?)': async", SCRIPT.read_text(), re.MULTILINE)
AI_SDK_NEEDS = "needs Node.js, and MICROBATCH_NODE_MODULES: where ai, @ai-sdk/openai, @ai-sdk/openai-compatible and zod are installed"

POLICY = mb.FlushPolicy(idle="wait", max_wait=1.0, max_batch_size=CALLERS)


@asynccontextmanager
async def gateway():
    """Yield an endpoint and a gateway in front of it."""
    async with ToolEndpoint() as endpoint, Gateway(endpoint.base_url, policy=POLICY, tokens="bytes") as served:
        yield endpoint, served


def check(record, endpoint, name, through, answers, kind):
    """Record how the answers to questions 0, 1, 2, ... and the calls for them came out.

    Fail if that is worse than what the documentation's table says. What is better passes, and is to be written into it.
    """
    framework, _, mode = name.partition(" ")
    right = sum(is_right(answer, number, kind) for number, answer in enumerate(answers))
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    record(framework, mode, through, right, endpoint.calls, type(errors[0]).__name__ if errors else "")
    found = cell(right, endpoint.calls)
    said = found if WRITE in os.environ else documented().get((framework, mode, through), NOT_MEASURED)
    if errors and said != NO_ANSWER:
        raise errors[0]
    assert right in (0, CALLERS)
    assert grade(found) <= grade(said), f"{found}, and the table says {said}; with {WRITE}=1 it is written anew"


def grade(said):
    """Return 0 for few calls, 1 for many, 2 for no answer; -1 for what the table lacks."""
    return {NO_ANSWER: 2, NOT_MEASURED: -1}[said] if not said.isdigit() else int(int(said) > MOST_CALLS)


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


@pytest.mark.parametrize("direct", [False, True])
async def test_langchain_sends_tokens_by_default_which_go_alone(direct, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    package = pytest.importorskip("langchain_openai", reason="needs langchain_openai")
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _name: load_encoding("cl100k_base"))
    async with gateway() as (endpoint, served):
        transport = mb.OpenAIChat(base_url=endpoint.base_url, api_key=KEY)
        async with AsyncOpenAI(mb.Microbatcher(transport, policy=POLICY, tokens="bytes")) as client:
            more = {"async_client": client.embeddings} if direct else {}
            embedder = package.OpenAIEmbeddings(model=EMBEDDER, base_url=served.base_url, api_key=KEY, **more)
            answers = await ask_all(lambda number: embedder.aembed_query(question(number)))
    assert answers == [right_vector(number) for number in range(CALLERS)]
    assert endpoint.calls == CALLERS


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
