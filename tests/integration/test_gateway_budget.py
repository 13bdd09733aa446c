"""The gateway within a budget: what clients are told, and what operators see."""

import asyncio
import json
import re

import openai
import pytest
from aiohttp import web
from gateway_world import MODEL, Watched, connection, gateway, post, recorder, sdk, serve, status, talk
from helpers import each

import microbatch as mb

pytestmark = [pytest.mark.slow, pytest.mark.promise(of="budget")]

QUESTION = [{"role": "user", "content": "hello"}]
PRICES = {MODEL: mb.Price(100.0, 100.0)}


def error_of(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    headers = dict(line.decode().lower().split(": ", 1) for line in head.split(b"\r\n")[1:])
    return headers, json.loads(body)["error"]


@each("streamed", [False, True])
async def test_the_sdk_is_told_once_that_the_quota_is_used_up(streamed):
    async with (
        Watched() as upstream,
        gateway(upstream, budget=mb.Budget(usd=0), prices=PRICES) as served,
        sdk(served) as client,
    ):
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(model=MODEL, messages=QUESTION, stream=streamed)
        error = refused.value
        assert (error.status_code, error.code, error.type) == (429, "insufficient_quota", "insufficient_quota")
        assert "retry-after" not in error.response.headers
        stats = served.stats()
        assert (stats.items, stats.failed, stats.budget.refused) == (1, 1, 1)  # the client has not tried again
    assert upstream.heard == []


async def test_the_end_of_the_period_is_told_and_what_others_have_spent_is_not():
    budget = mb.Budget(tokens=1, period="hour")
    async with Watched() as upstream, gateway(upstream, budget=budget) as served:
        answer = await talk(served.port, post(json.dumps({"model": MODEL, "messages": QUESTION}).encode()))
        headers, error = error_of(answer)
        assert status(answer) == 429
        assert 0 < int(headers["retry-after"]) <= 3_600
        assert headers["x-should-retry"] == "false"
        assert set(re.findall(r"\d+", error["message"])) == {headers["retry-after"]}


async def test_a_model_without_a_price_is_the_clients_mistake():
    async with Watched() as upstream, gateway(upstream, budget=mb.Budget(usd=1), prices=PRICES) as served:
        answer = await talk(served.port, post(json.dumps({"model": "unheard-of", "messages": QUESTION}).encode()))
        assert status(answer) == 400
        relayed = post(b'{"model": "unheard-of", "input": "x"}', path="/v1/embeddings", authorization="Bearer sk-x")
        assert status(await talk(served.port, relayed)) == 400
    assert upstream.heard == []


@each(
    "path, body, expected",
    [
        ("/v1/embeddings", {"model": MODEL, "input": "x" * 100}, 40),
        ("/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "max_tokens": 50}, 90),
    ],
)
async def test_relayed_requests_are_charged_and_corrected_by_what_the_answer_reports(path, body, expected):
    answers = [
        {"usage": {"prompt_tokens": 7, "completion_tokens": 3}},
        {"no": "usage"},
        None,
    ]
    async with recorder() as upstream:

        async def answer(_request):
            told = answers.pop(0)
            return web.Response(status=400) if told is None else web.json_response(told)

        upstream.answer = answer
        async with gateway(upstream.url, budget=mb.Budget(tokens=200, per="tenant")) as served:

            def request(key="sk-x"):
                return post(
                    json.dumps(body).encode(), path=path, authorization=f"Bearer {key}", x_microbatch_batch="no"
                )

            def spent():
                return served.stats().budget.spent_tokens

            await talk(served.port, request())
            assert spent() == 10
            await talk(served.port, request())
            kept = spent() - 10
            assert 20 < kept < expected
            await talk(served.port, request())
            assert spent() == 10 + kept
            served.batcher.spending._budget.tokens = spent()
            answer = await talk(served.port, request())
            assert (status(answer), error_of(answer)[1]["code"]) == (429, "insufficient_quota")
            assert error_of(answer)[0]["x-should-retry"] == "false"
            assert len(upstream.requests) == 3
            answers.append({"usage": {"prompt_tokens": 7, "completion_tokens": 3}})
            assert status(await talk(served.port, request("sk-another"))) == 200
            assert served.stats().forwarded == 4


@each(
    "asked, granted, price", [("flex", "flex", 0.5), ("flex", "default", 1), (None, "priority", 2), ("auto", None, 1)]
)
async def test_relayed_requests_are_charged_at_their_service_tier(asked, granted, price):
    tiers = {"flex": mb.Price(0.5, 0.5), "priority": mb.Price(2.0, 2.0)}
    prices = {MODEL: mb.Price(1.0, 1.0, tiers=tiers)}
    async with recorder() as upstream:

        async def answer(_request):
            return web.json_response(
                {"service_tier": granted, "usage": {"prompt_tokens": 900, "completion_tokens": 100}}
            )

        upstream.answer = answer
        async with gateway(upstream.url, budget=mb.Budget(usd=1.0), prices=prices) as served:
            body = {"model": MODEL, "messages": QUESTION} | ({} if asked is None else {"service_tier": asked})
            await talk(served.port, post(json.dumps(body).encode(), x_microbatch_batch="no"))
            assert served.stats().budget.spent_usd == pytest.approx(price * 1_000 / 1e6)


async def test_a_stream_that_is_relayed_is_paid_by_its_last_event():
    async with (
        Watched() as upstream,
        gateway(upstream, budget=mb.Budget(tokens=10_000)) as served,
        sdk(served) as client,
    ):
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"X-Microbatch-Batch": "no"},
        )
        usage = [event.usage async for event in stream if event.usage][-1]
        async with asyncio.timeout(20):
            while served.stats().in_flight:  # noqa: ASYNC110 the task that held the slot has its turn
                await asyncio.sleep(0.001)
        assert served.stats().forwarded == 1
        assert served.stats().budget.spent_tokens == usage.total_tokens


async def test_the_flags_of_serve_set_a_budget_and_the_metrics_show_it():
    async with Watched() as upstream:
        words = ("--upstream", upstream.base_url, "--port", "0", "--budget-tokens", "5000", "--budget-period", "day")
        async with (
            serve(*words, "--budget-per", "batcher", OPENAI_API_KEY="sk-x") as served,
            sdk(served, "microbatch") as client,
        ):
            answered = []
            with pytest.raises(openai.RateLimitError):
                while len(answered) < 1_000:
                    answered.append(await client.chat.completions.create(model=MODEL, messages=QUESTION))
            assert 10 < len(answered) < 500
            async with connection(served.port) as (reader, writer):
                writer.write(b"GET /stats HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                told = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])["budget"]
        assert 4_000 < told["spent_tokens"] <= 5_000
        assert told["left_tokens"] == 5_000 - told["spent_tokens"]


async def test_flags_of_a_budget_without_a_limit_are_refused():
    with pytest.raises(AssertionError, match="--budget-period needs --budget-usd or --budget-tokens"):
        async with serve("--upstream", "http://127.0.0.1:1/v1", "--port", "0", "--budget-period", "day"):
            pass
