"""The bound on combined replies on the wire: the names it has, the refusals it meets, and where a stream is left."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from bounded import Label, by_map, in_waves, messages

import microbatch as mb
from microbatch.testing import Faults, Latency, SimulatedEndpoint

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

NAMES = ("max_tokens", "max_completion_tokens")
Refuse = "Callable[[dict[str, Any], int], tuple[int, Any] | None]"


def limits(bodies: list[dict[str, Any]]) -> list[int | None]:
    return [next((body[name] for name in NAMES if name in body), None) for body in bodies]


def batcher_for(base_url: str) -> mb.Microbatcher:
    transport = mb.OpenAIChat("any", base_url=base_url, api_key="any")
    return mb.Microbatcher(transport, policy=mb.FlushPolicy(max_batch_size=8, idle="wait"))


class Refusing:
    """An endpoint in front of a simulated one that refuses what it is told to."""

    def __init__(
        self, endpoint: SimulatedEndpoint, refuse: Callable[[dict[str, Any], int], tuple[int, Any] | None]
    ) -> None:
        self.endpoint = endpoint
        self.refuse = refuse
        self.bodies: list[dict[str, Any]] = []
        self.refused = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.bodies.append(body)
        refusal = self.refuse(body, len(self.bodies))
        if refusal is not None:
            self.refused += 1
            status, said = refusal
            return web.json_response(said, status=status)
        reply = self.endpoint.reply(self.endpoint.read({**body, "stream": False, "stream_options": None}))
        content = {
            "message": {"role": "assistant", "content": reply.pieces.text},
            "index": 0,
            "finish_reason": reply.finish_reason,
        }
        usage = {"prompt_tokens": reply.usage.prompt_tokens, "completion_tokens": reply.usage.completion_tokens}
        return web.json_response({"id": "x", "object": "chat.completion", "choices": [content], "usage": usage})


@asynccontextmanager
async def refusing(
    refuse: Callable[[dict[str, Any], int], tuple[int, Any] | None],
) -> AsyncIterator[tuple[Refusing, str]]:
    server = Refusing(SimulatedEndpoint(), refuse)
    app = web.Application()
    app.router.add_route("POST", "/v1/chat/completions", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield server, f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def over(limit: int, status: int, message: str, **more: Any) -> Any:
    """Return what refuses every limit above *limit*, in the words of *message*."""

    def refuse(body: dict[str, Any], _number: int) -> tuple[int, Any] | None:
        asked = limits([body])[0]
        if asked is None or asked <= limit:
            return None
        return status, {
            "error": {"message": message.format(asked=asked, limit=limit), "type": "invalid_request_error", **more}
        }

    return refuse


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            400,
            "max_tokens is too large: {asked}. This model supports at most {limit} completion tokens, whereas you provided {asked}.",
        ),
        (422, "max_completion_tokens must be less than or equal to {limit}"),
        (
            402,
            "This request requires more credits, or fewer max_tokens. You requested up to {asked}, but can only afford {limit}.",
        ),
        (400, "max_tokens: {asked} > {limit}, which is the maximum allowed number of output tokens"),
    ],
)
async def test_a_refusal_of_the_bound_is_paid_for_once_and_is_nobodys_failure(status: int, message: str) -> None:
    async with refusing(over(1_000, status, message)) as (server, url), batcher_for(url) as batcher:
        await by_map(batcher, 24, str)
        await in_waves(batcher, 24, str, each=8)
        stats = batcher.stats()
    assert server.refused == 1
    assert limits(server.bodies)[1] == 1_000
    assert (stats.failed, stats.fallback_calls) == (0, 0)
    assert stats.batches == 6, "and nothing is bisected or gets smaller"


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda words: {
            "error": {
                "message": "Provider returned error",
                "code": 400,
                "metadata": {"raw": json.dumps({"error": words})},
            }
        },
        lambda words: {"error": json.dumps({"message": words})},
        lambda words: {"detail": [{"loc": ["body", "max_tokens"], "msg": words, "type": "less_than_equal"}]},
        lambda words: {"object": "error", "message": words, "type": "BadRequestError", "code": 400},
    ],
)
async def test_the_words_are_found_wherever_gateways_put_them(wrapped: Any) -> None:
    def refuse(body: dict[str, Any], _number: int) -> tuple[int, Any] | None:
        asked = limits([body])[0]
        return (
            None if asked is None or asked <= 1_000 else (400, wrapped("max_tokens must be less than or equal to 1000"))
        )

    async with refusing(refuse) as (server, url), batcher_for(url) as batcher:
        await by_map(batcher, 24, str)
    assert server.refused == 1
    assert limits(server.bodies)[1:] == [1_000] * 3


async def test_an_endpoint_that_takes_no_limit_under_any_name_gets_none() -> None:
    def refuse(body: dict[str, Any], _number: int) -> tuple[int, Any] | None:
        name = next((name for name in NAMES if name in body), None)
        if name is None:
            return None
        said = f"Unsupported parameter: '{name}' is not supported with this model."
        return 400, {"error": {"message": said, "param": name, "code": "unsupported_parameter"}}

    async with refusing(refuse) as (server, url), batcher_for(url) as batcher:
        await by_map(batcher, 24, Label)
        stats = batcher.stats()
    assert server.refused == 2, "each name once"
    assert limits(server.bodies)[2:] == [None] * 3
    assert (stats.failed, stats.batches) == (0, 3)


async def test_a_prompt_that_is_refused_with_and_without_the_bound_is_a_matter_of_size() -> None:
    """The words name the context window without a number, and the bound is not to blame: one call is tried without it, and no other."""

    def refuse(body: dict[str, Any], _number: int) -> tuple[int, Any] | None:
        poisonous = "Product 3," in body["messages"][-1]["content"]
        return (400, {"error": {"message": "context length exceeded"}}) if poisonous else None

    async with refusing(refuse) as (server, url), batcher_for(url) as batcher:
        asked = (batcher.submit(messages(number)) for number in range(8))
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(each) for each in outcomes] == [mb.Reply] * 3 + [mb.ContextTooLong] + [mb.Reply] * 4
        # 8 with the bound and without; 4 and 4; 2 and 2; 1 and 1: one more than bisecting takes.
        assert len(server.bodies) == 1 + 1 + 2 * 3
        first, second, *halves = limits(server.bodies[:6])
        assert first is not None
        assert second is None
        assert None not in halves, "the bound stays"


async def test_a_credit_that_is_gone_is_no_matter_of_the_bound_after_one_try() -> None:
    def refuse(_body: dict[str, Any], _number: int) -> tuple[int, Any] | None:
        return 402, {"error": {"message": "Insufficient credits", "code": 402}}

    async with refusing(refuse) as (server, url), batcher_for(url) as batcher:
        with pytest.raises(mb.QuotaExhausted):
            await in_waves(batcher, 8, str, each=8)
    assert len(server.bodies) == 2


@pytest.mark.parametrize("only", NAMES)
async def test_the_bound_goes_out_under_the_name_the_endpoint_takes(only: Any) -> None:
    async with (
        SimulatedEndpoint(max_tokens_name=only, record=True) as endpoint,
        batcher_for(endpoint.base_url) as batcher,
    ):
        await by_map(batcher, 24, Label)
        assert all(only in body for body in endpoint.requests[1:])
        assert len(endpoint.requests) == (3 if only == "max_tokens" else 4)


@pytest.mark.parametrize(
    "options",
    [
        {"max_output_tokens": 4_096},
        {"context_tokens": 4_096},
        {"reasoning_tokens": 3_000},
        {"reasoning_tokens": 3_000, "max_output_tokens": 16_384},
    ],
)
async def test_limits_and_hidden_thoughts_are_learned_over_sockets_too(options: Any) -> None:
    async with SimulatedEndpoint(record=True, **options) as endpoint, batcher_for(endpoint.base_url) as batcher:
        await by_map(batcher, 64, str)
        sent = len(endpoint.requests)
        await in_waves(batcher, 64, Label, each=8)
        stats = batcher.stats()
        assert stats.failed == 0
        assert len(endpoint.requests) <= 16 + 2
        assert sent <= 8 + 2


async def test_a_stream_of_a_model_that_rambles_on_is_left_two_elements_past_the_last() -> None:
    faults = Faults("rambling", rate=1.0, on="combined")
    latency = Latency(first_token=0.01, tokens_per_second=2_000)
    async with SimulatedEndpoint(faults=faults, latency=latency) as endpoint, batcher_for(endpoint.base_url) as batcher:
        outputs = await in_waves(batcher, 8, str, each=8)
        assert outputs == [endpoint.answer(messages(number)[-1]["content"], None) for number in range(8)]
        while not endpoint.disconnects:  # bounded by the test's own timeout
            await batcher.submit(messages(99))
        stats = batcher.stats()
        assert stats.fallback_calls == 0
        assert stats.unreported_calls == 1
