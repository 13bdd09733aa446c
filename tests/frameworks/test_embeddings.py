"""Embeddings clients of well-known frameworks get sound vectors from the simulated endpoint; what is not installed is skipped."""

from __future__ import annotations

import pytest
from callers import KEY

from microbatch.testing import SimulatedEndpoint, embedded

# Warnings of the frameworks about themselves are no failures here.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODEL = "text-embedding-3-small"
TEXTS = ["Hello there", "another text", "a third"]


async def langchain(base_url):
    package = pytest.importorskip("langchain_openai")
    # Otherwise it counts tokens with a table that it downloads.
    embeddings = package.OpenAIEmbeddings(model=MODEL, base_url=base_url, api_key=KEY, check_embedding_ctx_length=False)
    return [*await embeddings.aembed_documents(TEXTS[:2]), await embeddings.aembed_query(TEXTS[2])]


async def litellm(base_url):
    package = pytest.importorskip("litellm")
    reply = await package.aembedding(model=f"openai/{MODEL}", input=TEXTS, api_base=base_url, api_key=KEY)
    return [element["embedding"] for element in reply.data]


async def pydantic_ai(base_url):
    package = pytest.importorskip("pydantic_ai.embeddings.openai")
    provider = pytest.importorskip("pydantic_ai.providers.openai").OpenAIProvider(base_url=base_url, api_key=KEY)
    model = package.OpenAIEmbeddingModel(MODEL, provider=provider)
    reply = await model.embed(TEXTS, input_type="document")
    return [list(vector) for vector in reply.embeddings]


@pytest.mark.parametrize("embed", [langchain, litellm, pydantic_ai])
async def test_a_frameworks_client_gets_the_vectors_of_its_texts(embed):
    async with SimulatedEndpoint() as endpoint:
        assert await embed(endpoint.base_url) == [embedded(text, MODEL).tolist() for text in TEXTS]
