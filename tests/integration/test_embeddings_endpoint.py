"""The simulated endpoint's embeddings, with the vendor's SDK and over plain HTTP."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from microbatch.protocols import EmbeddingCall
from microbatch.testing import EmbeddingFaults, Quota, SimulatedEmbeddings, SimulatedEndpoint, embedded
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

openai = pytest.importorskip("openai")

MODEL = "text-embedding-3-small"
TEXTS = ["Hello there", "a", "Hello, there!"]


def client(endpoint: SimulatedEndpoint, **options: Any) -> Any:
    return openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="sk-right", max_retries=0, **options)


@pytest.fixture
async def endpoint() -> AsyncIterator[SimulatedEndpoint]:
    async with SimulatedEndpoint(api_keys=["sk-right"], record=True) as opened:
        yield opened


def numbers(reply: Any) -> list[list[float]]:
    return [each.embedding for each in sorted(reply.data, key=lambda each: each.index)]


def expected(texts: list[str], model: str = MODEL, dimensions: int | None = None) -> list[list[float]]:
    return [embedded(text, model, dimensions).tolist() for text in texts]


async def test_the_vendors_sdk_gets_the_same_vectors_in_every_form(endpoint: SimulatedEndpoint) -> None:
    async with client(endpoint) as sdk:
        create = sdk.embeddings.create
        listed = await create(model=MODEL, input=TEXTS)  # in base64, by the SDK's own choice
        assert numbers(listed) == expected(TEXTS)
        assert numbers(await create(model=MODEL, input=TEXTS, encoding_format="float")) == expected(TEXTS)
        assert isinstance((await create(model=MODEL, input="a", encoding_format="base64")).data[0].embedding, str)
        assert numbers(await create(model=MODEL, input=TEXTS[0])) == expected(TEXTS[:1])
        assert numbers(await create(model=MODEL, input=[9906, 1070])) == expected(TEXTS[:1])
        assert numbers(await create(model=MODEL, input=[[9906, 1070], [64]])) == expected(TEXTS[:2])
        short = await create(model="text-embedding-3-large", input=TEXTS, dimensions=256)
        assert numbers(short) == expected(TEXTS, "text-embedding-3-large", 256)
    assert endpoint.requests[0]["encoding_format"] == "base64"
    assert (listed.object, listed.model, listed.data[0].object) == ("list", MODEL, "embedding")
    assert (listed.usage.prompt_tokens, listed.usage.total_tokens) == (7, 7)
    assert (endpoint.embedding_calls, endpoint.embedded_texts) == (7, 14)


async def test_the_sdk_and_our_transport_get_equal_vectors(endpoint: SimulatedEndpoint) -> None:
    transport = OpenAIChat(base_url=endpoint.base_url, api_key="sk-right", embedding_model=MODEL)
    async with client(endpoint) as sdk:
        theirs = await sdk.embeddings.create(model=MODEL, input=TEXTS)
    ours = await transport.embed(EmbeddingCall(inputs=TEXTS))
    await transport.aclose()
    assert [vector.tolist() for _, vector in ours.vectors] == numbers(theirs)
    assert [index for index, _ in ours.vectors] == [0, 1, 2]
    assert ours.usage.prompt_tokens == theirs.usage.prompt_tokens


async def test_a_full_list_of_texts_is_embedded(endpoint: SimulatedEndpoint) -> None:
    texts = [f"text number {number}" for number in range(2_048)]
    async with client(endpoint) as sdk:
        assert numbers(await sdk.embeddings.create(model=MODEL, input=texts)) == expected(texts)
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.embeddings.create(model=MODEL, input=[*texts, "one more"])
    assert (caught.value.code, caught.value.param) == ("array_above_max_length", "input")


async def test_refusals_have_the_bodies_of_openais(endpoint: SimulatedEndpoint) -> None:
    async with client(endpoint) as sdk:
        for given in ("", [], ["a", ""]):
            with pytest.raises(openai.BadRequestError) as caught:
                await sdk.embeddings.create(model=MODEL, input=given)
            error = caught.value
            assert error.body == {
                "message": error.body["message"],
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
            assert error.request_id
        with pytest.raises(openai.BadRequestError):
            await sdk.embeddings.create(model="text-embedding-ada-002", input="a", dimensions=3)
        with pytest.raises(openai.AuthenticationError):
            await sdk.with_options(api_key="sk-wrong").embeddings.create(model=MODEL, input="a")
    assert endpoint.calls == 4


async def test_a_model_that_is_not_there_is_refused() -> None:
    async with SimulatedEndpoint(embeddings=SimulatedEmbeddings(models=[MODEL])) as endpoint, client(endpoint) as sdk:
        await sdk.embeddings.create(model=MODEL, input="a")
        with pytest.raises(openai.NotFoundError) as caught:
            await sdk.embeddings.create(model="gpt-4.1-mini", input="a")
    assert caught.value.code == "model_not_found"


async def test_the_quota_is_that_of_the_key_and_of_the_model_whatever_is_asked() -> None:
    async with SimulatedEndpoint(quota=Quota(rpm=2)) as endpoint, client(endpoint) as sdk:
        raw = await sdk.embeddings.with_raw_response.create(model=MODEL, input="a")
        assert raw.headers["x-ratelimit-remaining-requests"] == "1"
        await sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
        with pytest.raises(openai.RateLimitError) as caught:
            await sdk.embeddings.create(model=MODEL, input="a")
        assert float(caught.value.response.headers["retry-after"]) > 0
        await sdk.embeddings.create(model="another", input="a")


async def test_a_fault_of_an_error_response_reaches_the_client() -> None:
    faults = EmbeddingFaults("http_429", rate=1, retry_after=7, limit=1)
    async with SimulatedEndpoint(embeddings=SimulatedEmbeddings(faults=faults)) as endpoint, client(endpoint) as sdk:
        with pytest.raises(openai.RateLimitError) as caught:
            await sdk.embeddings.create(model=MODEL, input="a")
        assert caught.value.response.headers["retry-after"] == "7"
        await sdk.embeddings.create(model=MODEL, input="a")
    assert endpoint.faulted == 1


async def test_a_reply_may_break_in_the_middle_or_never_come() -> None:
    for kind in ("cut", "hang"):
        faults = EmbeddingFaults(kind, rate=1)
        async with SimulatedEndpoint(embeddings=SimulatedEmbeddings(faults=faults)) as endpoint:
            async with client(endpoint, timeout=0.2 if kind == "hang" else 60) as sdk:
                with pytest.raises(openai.APIConnectionError) as caught:
                    await sdk.embeddings.create(model=MODEL, input="a")
            assert isinstance(caught.value, openai.APITimeoutError) == (kind == "hang")


@pytest.mark.parametrize("base64", [False, True])
async def test_a_nan_is_written_as_servers_in_python_do(base64: bool) -> None:
    faults = EmbeddingFaults("nan", rate=1)
    body = {"model": MODEL, "input": TEXTS, **({"encoding_format": "base64"} if base64 else {})}
    async with (
        SimulatedEndpoint(embeddings=SimulatedEmbeddings(faults=faults)) as endpoint,
        aiohttp.ClientSession() as session,
        session.post(f"{endpoint.base_url}/embeddings", json=body) as response,
    ):
        raw = await response.read()
    assert (b"NaN" in raw) != base64
    assert len(json.loads(raw)["data"]) == 3
