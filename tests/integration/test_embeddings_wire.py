"""`OpenAIChat.embed` over real sockets: what goes out, what comes back, and what endpoints do instead."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from microbatch import errors
from microbatch.messages import Usage
from microbatch.protocols import ChatCall, EmbeddingCall
from microbatch.testing import EmbeddingFaults, SimulatedEmbeddings, SimulatedEndpoint
from microbatch.transports.openai_chat import OpenAIChat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MODEL = "text-embedding-3-small"
KEY = "canary-4f1b9c77-not-shaped-like-a-key"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


class Endpoint:
    """A server whose answers *respond* makes from the JSON of a request: JSON, a status and JSON, or a whole response."""

    def __init__(self, respond: Callable[[dict[str, Any]], Any]) -> None:
        self.respond = respond
        self.bodies: list[dict[str, Any]] = []
        self.requests: list[web.Request] = []
        self.base_url = ""

    @property
    def formats(self) -> list[str | None]:
        """The `encoding_format` of each request."""
        return [body.get("encoding_format") for body in self.bodies]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.bodies.append(body)
        self.requests.append(request)
        said = self.respond(body)
        if isinstance(said, web.Response):
            return said
        status, said = said if isinstance(said, tuple) else (200, said)
        return web.json_response(said, status=status)


@contextlib.asynccontextmanager
async def serving(respond: Callable[[dict[str, Any]], Any]) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(respond)
    application = web.Application(client_max_size=2**28)
    application.router.add_route("*", "/{path:.*}", endpoint.handle)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        endpoint.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield endpoint
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def connected(endpoint: Endpoint | SimulatedEndpoint, **options: Any) -> AsyncIterator[OpenAIChat]:
    options = {"embedding_model": MODEL, "base_url": endpoint.base_url, "api_key": KEY, **options}
    transport = OpenAIChat(**options)
    try:
        yield transport
    finally:
        await transport.aclose()


def vector_of(text: str) -> list[float]:
    return [float(len(text)), float(sum(map(ord, text)) % 97), 0.5]


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """Answer as OpenAI does."""
    data = []
    for index, text in enumerate(body["input"]):
        numbers: Any = vector_of(text)
        if body.get("encoding_format") == "base64":
            numbers = base64.b64encode(struct.pack("<3f", *numbers)).decode()
        data.append({"object": "embedding", "index": index, "embedding": numbers})
    usage = {"prompt_tokens": 7, "total_tokens": 7}
    return {"object": "list", "data": data, "model": body["model"], "usage": usage}


def call(*texts: str, **fields: Any) -> EmbeddingCall:
    return EmbeddingCall(inputs=texts or ("one", "three"), **fields)


def sound(*texts: str) -> list[tuple[int, list[float]]]:
    return [(index, vector_of(text)) for index, text in enumerate(texts or ("one", "three"))]


async def embed(
    transport: OpenAIChat, wanted: EmbeddingCall | None = None
) -> list[tuple[int | None, list[float] | None]]:
    """Send a call, again where the transport says so, and return the vectors."""
    wanted = wanted or call()
    for _ in range(4):
        try:
            embedded = await transport.embed(wanted)
        except errors.StatusError as error:
            if not error.again:
                raise
        else:
            return [(index, None if vector is None else vector.tolist()) for index, vector in embedded.vectors]
    raise AssertionError("the transport goes round in circles")


# --- the request, and a sound reply


async def test_a_call_is_sent_as_documented_and_its_reply_is_read() -> None:
    headers = {"x-request-id": "req_1", "x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "993"}
    options: dict[str, Any] = {"headers": {"X-Own": "1"}, "query": {"api-version": "2"}}
    wanted = call("one", "three", dimensions=3, params={"user": "u"}, headers={"X-Call": "2"})

    def respond(body: dict[str, Any]) -> web.Response:
        return web.json_response(answer(body), headers=headers)

    async with serving(respond) as endpoint, connected(endpoint, **options) as transport:
        embedded = await transport.embed(wanted)
    assert [(index, vector.tolist()) for index, vector in embedded.vectors] == sound()
    assert (embedded.model, embedded.usage, embedded.request_id) == (MODEL, Usage(7), "req_1")
    assert embedded.finish_reason == "stop"
    assert embedded.limits.remaining_tokens == 993
    fields = {"model": MODEL, "input": ["one", "three"], "dimensions": 3, "user": "u", "encoding_format": "base64"}
    assert endpoint.bodies == [fields]
    (request,) = endpoint.requests
    assert (request.method, request.path_qs) == ("POST", "/v1/embeddings?api-version=2")
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert (request.headers["X-Own"], request.headers["X-Call"]) == ("1", "2")
    assert request.headers["Content-Type"] == "application/json"


async def test_one_text_is_sent_as_a_list_and_fields_that_nobody_asked_for_are_not_sent() -> None:
    async with serving(answer) as endpoint, connected(endpoint) as transport:
        assert await embed(transport, call("alone")) == sound("alone")
    assert endpoint.bodies == [{"model": MODEL, "input": ["alone"], "encoding_format": "base64"}]


async def test_a_call_may_name_its_model_its_key_and_its_path() -> None:
    async with serving(answer) as endpoint, connected(endpoint, headers={"OpenAI-Project": "p"}) as transport:
        theirs = {"Authorization": "Bearer theirs", ":path": "/openai/deployments/d/embeddings?api-version=1"}
        await embed(transport, call(model="another", headers=theirs))
    (request,) = endpoint.requests
    assert endpoint.bodies[0]["model"] == "another"
    assert request.path_qs == "/v1/openai/deployments/d/embeddings?api-version=1"
    assert request.headers["Authorization"] == "Bearer theirs"
    assert "OpenAI-Project" not in request.headers


async def test_chat_and_embeddings_have_models_of_their_own() -> None:
    async with serving(answer) as endpoint, connected(endpoint, model="chat", embedding_model=None) as transport:
        with pytest.raises(errors.ConfigError, match=r"embedding_model="):
            await transport.embed(call())
        assert transport.embedding_model is None
    assert endpoint.bodies == []


@pytest.mark.parametrize(
    "fields", [{"headers": {"X": "a\nb"}}, {"headers": {":path": "../x"}}, {"params": {"x": object()}}]
)
async def test_a_call_that_cannot_be_written_is_a_config_error(fields: dict[str, Any]) -> None:
    async with serving(answer) as endpoint, connected(endpoint) as transport:
        with pytest.raises(errors.ConfigError):
            await transport.embed(call(**fields))
    assert endpoint.bodies == []


async def test_a_large_request_and_its_reply_pass() -> None:
    texts = [f"text {number} " + "x" * 1_000 for number in range(2_048)]
    async with serving(answer) as endpoint, connected(endpoint) as transport:
        assert await embed(transport, call(*texts)) == sound(*texts)


# --- base64 that is not sent

REFUSALS = [
    (400, {"error": {"message": "Unsupported parameter: 'encoding_format'", "param": "encoding_format"}}),
    (400, {"error": {"message": "Invalid value for 'encoding_format' = base64. Supported values: ['float']."}}),
    (
        400,
        {
            "error": {
                "message": "litellm.UnsupportedParamsError: gemini does not support parameters: {'encoding_format': 'base64'}"
            }
        },
    ),
    (
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": "Invalid value at 'encoding_format' (base64)",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
    ),
    (
        422,
        {
            "detail": [
                {"type": "extra_forbidden", "loc": ["body", "encoding_format"], "msg": "Extra inputs are not permitted"}
            ]
        },
    ),
    (
        422,
        {"detail": [{"type": "literal_error", "loc": ["body", "encoding_format"], "msg": "Input should be 'float'"}]},
    ),
    (501, {"error": {"message": "base64 encoding is not implemented"}}),
    (200, {"error": {"message": "encoding_format must be float", "type": "invalid_request_error"}}),
    (400, {"error": {"message": "An error occurred while reading the response body", "code": "PROXY_READ_ERROR"}}),
    (400, {"error": {"message": "Bad request"}}),
]


@pytest.mark.parametrize(("status", "refusal"), REFUSALS)
async def test_a_refusal_of_base64_is_paid_for_once(status: int, refusal: Any) -> None:
    def respond(body: dict[str, Any]) -> Any:
        return (status, refusal) if "encoding_format" in body else answer(body)

    async with serving(respond) as endpoint, connected(endpoint) as transport:
        for _ in range(3):
            assert await embed(transport) == sound()
        assert endpoint.formats == ["base64", None, None, None]
        await embed(transport, call(model="another"))  # of which nothing is known yet
    assert endpoint.formats[4:] == ["base64", None]


async def test_an_endpoint_that_ignores_base64_is_not_asked_for_it_again() -> None:
    def respond(body: dict[str, Any]) -> Any:
        return answer({**body, "encoding_format": "float"})

    async with serving(respond) as endpoint, connected(endpoint) as transport:
        assert await embed(transport) == sound()
        assert await embed(transport) == sound()
    assert endpoint.formats == ["base64", None]


async def test_an_endpoint_whose_base64_cannot_be_read_is_asked_for_numbers() -> None:
    def respond(body: dict[str, Any]) -> Any:
        broken = {"data": [{"index": 0, "embedding": "not base64"}]}
        return broken if "encoding_format" in body else answer(body)

    async with serving(respond) as endpoint, connected(endpoint) as transport:
        assert await embed(transport, call("one")) == [(0, None)]
        assert await embed(transport, call("one")) == sound("one")
    assert endpoint.formats == ["base64", None]


async def test_one_unreadable_vector_says_nothing_about_base64_that_has_worked() -> None:
    def respond(body: dict[str, Any]) -> Any:
        return {"data": [{"index": 0, "embedding": "?"}]} if body["input"] == ["bad"] else answer(body)

    async with serving(respond) as endpoint, connected(endpoint) as transport:
        for text in ("good", "bad", "good"):
            await embed(transport, call(text))
    assert endpoint.formats == ["base64"] * 3


@pytest.mark.parametrize("encoding", ["float", "base64", "ubinary"])
async def test_a_callers_own_encoding_is_sent_unchanged_and_never_left_out(encoding: str) -> None:
    refusal = {"error": {"message": "encoding_format is not supported", "param": "encoding_format"}}
    async with serving(lambda _: (400, refusal)) as endpoint, connected(endpoint) as transport:
        with pytest.raises(errors.BadRequest) as caught:
            await transport.embed(call(params={"encoding_format": encoding}))
    assert not caught.value.again
    assert endpoint.formats == [encoding]


@pytest.mark.parametrize(
    "fields", [{"dimensions": 4_000}, {"params": {"dimensions": 4_000}}, {"params": {"input_type": "query"}}]
)
async def test_a_field_of_the_callers_that_is_refused_is_never_left_out(fields: dict[str, Any]) -> None:
    (name,) = fields.get("params", fields)
    refusal = {"error": {"message": f"Unsupported parameter: '{name}'", "param": name, "code": "unsupported_parameter"}}

    def respond(body: dict[str, Any]) -> Any:
        return (400, refusal) if name in body else answer(body)

    async with serving(respond) as endpoint, connected(endpoint) as transport:
        with pytest.raises(errors.BadRequest) as caught:
            await transport.embed(call(**fields))
        assert not caught.value.again
        assert await embed(transport) == sound()
    assert endpoint.formats == ["base64", "base64"]


@pytest.mark.parametrize(
    "message",
    [
        "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference.",
        "Invalid 'input': array too long. Expected an array with maximum length 2048, but instead got an array with length 2049.",
        "<400> InternalError.Algo.InvalidParameter: batch size is invalid, it should not be larger than 10.: input.contents",
        "Requested 600000 tokens, max 300000 tokens per request",
        "This model does not support specifying dimensions.",
        "model not found",
    ],
)
async def test_a_refusal_about_something_else_is_not_tried_again(message: str) -> None:
    async with serving(lambda _: (400, {"error": {"message": message}})) as endpoint, connected(endpoint) as transport:
        with pytest.raises(errors.BadRequest) as caught:
            await transport.embed(call())
    assert not caught.value.again
    assert len(endpoint.bodies) == 1


async def test_a_refusal_that_quotes_a_text_about_base64_is_not_about_base64() -> None:
    text = "what does encoding_format base64 mean in this api"
    refusal = {"error": {"message": f"the input '{text}' is not allowed"}}
    async with serving(lambda _: (400, refusal)) as endpoint, connected(endpoint) as transport:
        with pytest.raises(errors.BadRequest) as caught:
            await transport.embed(call(text))
    assert not caught.value.again
    assert "base64" not in str(caught.value)
    assert len(endpoint.bodies) == 1


async def test_a_refusal_without_a_reason_is_tried_without_base64_only_where_that_has_never_worked() -> None:
    def respond(body: dict[str, Any]) -> Any:
        return (400, {"error": {"message": "Bad request"}}) if "poison" in body["input"] else answer(body)

    async with serving(respond) as endpoint, connected(endpoint) as transport:
        with pytest.raises(errors.BadRequest):
            await embed(transport, call("poison"))
        assert endpoint.formats == ["base64", None]
        assert await embed(transport) == sound()
        with pytest.raises(errors.BadRequest):
            await embed(transport, call("poison"))
    assert endpoint.formats == ["base64", None, "base64", "base64"]


async def test_a_500_is_retried_without_base64_and_remembered_at_the_second_time() -> None:
    def respond(body: dict[str, Any]) -> Any:
        return (500, {"error": "cannot deserialize"}) if "encoding_format" in body else answer(body)

    async with serving(respond) as endpoint, connected(endpoint) as transport:
        for _ in range(2):
            wanted = call()
            with pytest.raises(errors.ServerError) as caught:
                await transport.embed(wanted)
            assert not caught.value.again  # the endpoint may be down, so it is a retry like others
            assert await embed(transport, wanted) == sound()
        assert await embed(transport) == sound()
    assert endpoint.formats == ["base64", None] * 2 + [None]


async def test_a_500_where_base64_has_worked_is_the_endpoints_trouble() -> None:
    troubles = iter([None, (500, {"error": "overloaded"}), None])
    async with serving(lambda body: next(troubles) or answer(body)) as endpoint, connected(endpoint) as transport:
        await embed(transport)
        wanted = call()
        with pytest.raises(errors.ServerError):
            await transport.embed(wanted)
        await embed(transport, wanted)
    assert endpoint.formats == ["base64"] * 3


# --- errors

STATUSES = [
    (400, {"message": "Invalid 'input[1]': maximum input length is 8192 tokens."}, errors.ContextTooLong),
    (
        400,
        {"message": "This model's maximum context length is 8192 tokens, however you requested 9000"},
        errors.ContextTooLong,
    ),
    (
        500,
        {"message": "input (992 tokens) is too large to process. increase the physical batch size"},
        errors.ContextTooLong,
    ),
    (500, {"message": "input is too large to process, please increase the physical batch size"}, errors.ContextTooLong),
    (500, {"message": "input prompt is too big compared to KV size, please increase KV size"}, errors.ContextTooLong),
    (413, {"message": "batch size 64 > maximum allowed batch size 32"}, errors.BadRequest),
    (404, {"message": "The model `x` does not exist", "code": "model_not_found"}, errors.BadRequest),
    (401, {"message": "Incorrect API key provided"}, errors.AuthFailed),
    (403, {"message": "You are not allowed to generate embeddings from this model"}, errors.AuthFailed),
    (400, {"message": "flagged", "code": "content_filter"}, errors.Filtered),
    (429, {"message": "You exceeded your current quota", "code": "insufficient_quota"}, errors.QuotaExhausted),
    (429, {"message": "Rate limit reached", "code": "rate_limit_exceeded"}, errors.RateLimited),
    (500, {"message": "The server had an error"}, errors.ServerError),
    (503, {"message": "overloaded"}, errors.ServerError),
    (307, {"message": "moved"}, errors.StatusError),
]


@pytest.mark.parametrize(("status", "error", "kind"), STATUSES)
async def test_refusals_are_those_of_chat(status: int, error: dict[str, Any], kind: type[errors.StatusError]) -> None:
    headers = {"x-request-id": "req_9", "retry-after": "3", "x-ratelimit-remaining-requests": "0"}

    def respond(_: object) -> web.Response:
        return web.json_response({"error": error}, status=status, headers=headers)

    async with serving(respond) as endpoint, connected(endpoint, model="m") as transport:
        with pytest.raises(errors.StatusError) as embedding:
            await transport.embed(call())
        with pytest.raises(errors.StatusError) as chat:
            await transport.send(ChatCall(messages=[{"role": "user", "content": "hi"}]), lambda _: None)
    ours, theirs = embedding.value, chat.value
    assert type(ours) is type(theirs) is kind
    for name in ("status", "code", "param", "request_id", "retry_after", "limits", "should_retry", "body"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.request_id == "req_9"
    assert ours.limits.remaining_requests == 0


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"not json", b"<html><title>Sign in</title>", b'{"data": []}', b'{"data": null}', b'{"object": "list"}'),
        *(
            b'{"data": [{"index": 0, "embedding": [1',
            b'{"choices": []}',
            b'{"data": [{"index": 0, "embedding": null}]}',
        ),
    ],
)
async def test_a_200_without_vectors_is_a_failure_of_the_endpoint(body: bytes) -> None:
    kind = "application/json"
    async with (
        serving(lambda _: web.Response(body=body, content_type=kind)) as endpoint,
        connected(endpoint) as transport,
    ):
        with pytest.raises(errors.ServerError, match=r"no vectors.*/v1") as caught:
            await transport.embed(call())
    assert caught.value.status == 200
    assert not caught.value.again


async def test_an_error_quotes_neither_texts_nor_keys() -> None:
    def respond(body: dict[str, Any]) -> Any:
        return 400, {"error": {"message": f"input: cannot read {body['input'][1]} with {KEY}"}}

    secret = "the patient in room seven is called Aloysius"
    async with serving(respond) as endpoint, connected(endpoint) as transport:
        with pytest.raises(errors.BadRequest) as caught:
            await transport.embed(call("one", secret))
        assert "cannot read" in str(caught.value)
        with pytest.raises(errors.BadRequest) as long:
            await transport.embed(call("x" * 300_000, secret))
    for error in (caught.value, long.value):
        assert "Aloysius" not in f"{error!r}{error}"
        assert KEY not in f"{error!r}{error}{error.body}"


async def test_a_key_that_is_refused_is_asked_for_once_more() -> None:
    keys = iter(["old", "new"])

    def respond(body: dict[str, Any]) -> Any:
        right = endpoint.requests[-1].headers["Authorization"] == "Bearer new"
        return answer(body) if right else (401, {"error": {"message": "expired"}})

    async with serving(respond) as endpoint, connected(endpoint, api_key=lambda: next(keys)) as transport:
        assert await embed(transport) == sound()
    assert len(endpoint.bodies) == 2


async def test_a_key_that_stays_refused_ends_the_call() -> None:
    keys = iter("abc")
    refused = 401, {"error": {"message": "no"}}
    async with serving(lambda _: refused) as endpoint, connected(endpoint, api_key=lambda: next(keys)) as transport:
        with pytest.raises(errors.AuthFailed):
            await embed(transport)
    assert len(endpoint.bodies) == 2


async def test_a_reply_beyond_the_limit_is_a_transport_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microbatch.transports.embeddings.MAX_REPLY_BYTES", 1_000)
    async with serving(answer) as endpoint, connected(endpoint) as transport:
        assert await embed(transport, call("one")) == sound("one")
        with pytest.raises(errors.TransportError, match="more than 1000 bytes"):
            await transport.embed(call(*["text"] * 100))


async def test_the_limit_of_a_reply_follows_the_number_of_texts() -> None:
    long = web.Response(body=b" " * (2 * 1024 * 1024), content_type="application/json")
    async with serving(lambda _: long) as endpoint, connected(endpoint) as transport:
        with pytest.raises(errors.TransportError, match="more than"):
            await transport.embed(call("one"))


def spoiled(kind: Any) -> SimulatedEndpoint:
    """Return an endpoint whose replies have a fault."""
    return SimulatedEndpoint(embeddings=SimulatedEmbeddings(faults=EmbeddingFaults(kind, rate=1)))


async def test_a_connection_that_breaks_in_the_reply_is_a_failed_connection() -> None:
    async with spoiled("cut") as endpoint, connected(endpoint) as transport:
        with pytest.raises(errors.ConnectFailed, match="in the middle"):
            await transport.embed(call())


@pytest.mark.parametrize("of", ["call", "transport"])
async def test_a_silent_endpoint_is_a_timeout(of: str) -> None:
    timeout = 0.1 if of == "transport" else 600
    async with spoiled("hang") as endpoint, connected(endpoint, timeout=timeout) as transport:
        with pytest.raises(errors.TransportTimeout, match=r"0\.1 s"):
            await transport.embed(call(timeout=0.1 if of == "call" else None))


async def test_an_endpoint_that_is_not_there_is_a_failed_connection() -> None:
    async with serving(answer) as endpoint:
        pass
    async with connected(endpoint) as transport:
        with pytest.raises(errors.ConnectFailed) as caught:
            await transport.embed(call())
    assert caught.value.unsent


@pytest.mark.parametrize("encoding", ["base64", "float"])
async def test_other_tasks_have_their_turn_while_a_long_reply_is_read(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = at_vectors = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr("microbatch.transports.embeddings.SLICE", 0.0)  # each vector is a slice
    async with serving(answer) as endpoint, connected(endpoint) as transport:
        await embed(transport)

        def begun(body: dict[str, Any]) -> Any:
            nonlocal at_vectors
            at_vectors = turns
            return answer(body)

        endpoint.respond = begun
        task = asyncio.create_task(others())
        await transport.embed(call(*["text"] * 500, params={"encoding_format": encoding}))
        task.cancel()
    assert turns - at_vectors >= 500
