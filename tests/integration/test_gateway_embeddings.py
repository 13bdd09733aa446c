"""Embeddings through the gateway, as OpenAI's own SDK and plain clients see them."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import math
from array import array
from contextlib import suppress

import aiohttp
import openai
import pytest
from embedding_world import DIMENSIONS, EMBEDDER, REFUSED, embedding_upstream, tokens_of, vector_of
from gateway_world import MODEL, ONE_ATTEMPT, connection, error_in, gateway, post, recorder, sdk, status, talk
from helpers import each, until
from test_gateway_observed import Client, lines, metrics, served_requests, totals

import microbatch as mb
from microbatch.gateway import GatewaySettings
from microbatch.gateway.vectors import AT_ONCE

pytestmark = [pytest.mark.slow, pytest.mark.promise(of="gateway_vectors")]

PATIENT = {"max_wait": 60}
QUICK_RETRY = mb.RetryPolicy(max_attempts=2, base=0.01)


def asked(texts, **more):
    return json.dumps({"model": EMBEDDER, "input": texts, **more}).encode()


def to_embeddings(body, **headers):
    return post(body, path="/v1/embeddings", **headers)


def parts(answer):
    """Status, headers in lower case, and JSON of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, json.loads(body)


async def embed(client, texts, **options):
    """The vectors of *texts*, in the order of their indices, which must be the order of the answer."""
    answer = await client.embeddings.create(model=EMBEDDER, input=texts, **options)
    assert [element.index for element in answer.data] == list(range(len(answer.data)))
    assert (answer.object, answer.model) == ("list", EMBEDDER)
    assert {element.object for element in answer.data} == {"embedding"}
    return [element.embedding for element in answer.data]


def right(texts, dimensions=DIMENSIONS):
    return [vector_of(text, dimensions).tolist() for text in ([texts] if isinstance(texts, str) else texts)]


async def together(served, texts, *requests):
    """The results of *requests*, which leave when all of their *texts* wait."""
    asked = asyncio.gather(*requests, return_exceptions=True)
    await until(lambda: served.stats().queued == texts or asked.done())
    served.batcher.flush()
    results = await asked
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, openai.APIError):
            raise result
    return results


# --- combining


@each("encoding", [{}, {"encoding_format": "float"}])
async def test_200_clients_with_a_text_each_leave_as_one_call_and_get_their_own_vectors(encoding):
    async with embedding_upstream() as upstream, gateway(upstream, policy=PATIENT) as served, sdk(served) as client:
        texts = [f"text {number}" for number in range(200)]
        vectors = await together(served, 200, *(embed(client, text, **encoding) for text in texts))
    assert len(upstream.calls) == 1
    assert vectors == [right(text) for text in texts]


async def test_200_clients_that_come_as_they_like_leave_as_few_calls():
    async with (
        embedding_upstream() as upstream,
        gateway(upstream, policy={"idle": "flush"}) as served,
        sdk(served) as client,
    ):
        await asyncio.gather(*(embed(client, f"warming up {number}") for number in range(50)))
        before = len(upstream.calls)
        texts = [f"text {number}" for number in range(200)]
        vectors = await asyncio.gather(*(embed(client, text) for text in texts))
    assert len(upstream.calls) - before <= 100
    assert vectors == [right(text) for text in texts]


async def test_lists_of_several_clients_leave_together_and_come_back_in_order():
    async with embedding_upstream() as upstream, gateway(upstream, policy=PATIENT) as served, sdk(served) as client:
        lists = [[f"{number}/{place}" for place in range(number + 1)] for number in range(8)]
        vectors = await together(served, 36, *(embed(client, texts) for texts in lists))
    assert vectors == [right(texts) for texts in lists]
    assert sorted(upstream.texts) == sorted(text for texts in lists for text in texts)
    assert len(upstream.calls) == 1


async def test_the_shares_of_all_clients_add_up_to_what_the_upstream_reports():
    async with embedding_upstream() as upstream, gateway(upstream, policy=PATIENT) as served, sdk(served) as client:
        lists = [["a"], ["a b c", "d"], ["e f"], ["one two three four five six"]]
        answers = await together(served, 5, *(client.embeddings.create(model=EMBEDDER, input=texts) for texts in lists))
        assert all(answer.usage.total_tokens == answer.usage.prompt_tokens > 0 for answer in answers)
        assert sum(answer.usage.prompt_tokens for answer in answers) == upstream.tokens
        assert served.stats().prompt_tokens == upstream.tokens
    assert len(upstream.calls) == 1


@each(
    "fields",
    [
        {"dimensions": 3},
        {"user": "u1"},
        {"encoding_format": "base64"},
        {"encoding_format": "float", "dimensions": 2, "user": "u2"},
    ],
)
async def test_requests_with_known_fields_are_combined_with_those_of_equal_fields(fields):
    async with embedding_upstream() as upstream, gateway(upstream, policy=PATIENT) as served:
        answers = await together(
            served,
            5,
            *(talk(served.port, to_embeddings(asked(f"t{number}", **fields))) for number in range(4)),
            talk(served.port, to_embeddings(asked("another", user="of another"))),
        )
    *combined, _ = (body for body in sorted(upstream.calls, key=lambda body: body.get("user") == "of another"))
    (call,) = combined
    assert sorted(call["input"]) == ["t0", "t1", "t2", "t3"]
    assert {name: call.get(name) for name in ("dimensions", "user")} == {
        name: fields.get(name) for name in ("dimensions", "user")
    }
    for number, answer in enumerate(answers[:4]):
        (element,) = parts(answer)[2]["data"]
        vector = element["embedding"]
        if fields.get("encoding_format") == "base64":
            vector = array("f", base64.b64decode(vector)).tolist()
        assert array("f", vector) == vector_of(f"t{number}", fields.get("dimensions", DIMENSIONS))


async def test_encodings_of_answers_are_each_clients_own_and_share_a_call():
    async with embedding_upstream() as upstream, gateway(upstream, policy=PATIENT) as served, sdk(served) as client:
        plain, packed, usual = await together(
            served,
            3,
            client.embeddings.create(model=EMBEDDER, input="a", encoding_format="float"),
            client.embeddings.create(model=EMBEDDER, input="b", encoding_format="base64"),
            client.embeddings.create(model=EMBEDDER, input="c"),
        )
    assert len(upstream.calls) == 1
    assert plain.data[0].embedding == vector_of("a").tolist()
    assert isinstance(packed.data[0].embedding, str)
    assert usual.data[0].embedding == vector_of("c").tolist()


async def test_fields_that_the_operator_allows_are_combined():
    policy = {**PATIENT, "combine_params": ("input_type",)}
    async with embedding_upstream() as upstream, gateway(upstream, policy=policy) as served:
        kinds = ["query", "passage", "query", "passage"]
        requests = (to_embeddings(asked(f"t{at}", input_type=kind)) for at, kind in enumerate(kinds))
        await together(served, 4, *(talk(served.port, request) for request in requests))
    assert sorted((body["input_type"], sorted(body["input"])) for body in upstream.calls) == [
        ("passage", ["t1", "t3"]),
        ("query", ["t0", "t2"]),
    ]


async def test_callers_with_different_keys_share_no_call():
    async with (
        embedding_upstream() as upstream,
        gateway(upstream, policy=PATIENT) as served,
        sdk(served, "sk-one") as one,
        sdk(served, "sk-two") as two,
    ):
        clients = {"one": one, "two": two}
        await together(
            served, 6, *(embed(clients[name], f"{name} {number}") for number in range(3) for name in clients)
        )
    for body, headers in zip(upstream.calls, upstream.headers, strict=True):
        owners = {text.split()[0] for text in body["input"]}
        assert len(owners) == 1
        assert headers["Authorization"] == f"Bearer sk-{owners.pop()}"


async def test_the_gateways_own_key_pays_for_embeddings_of_callers_without_one():
    async with embedding_upstream() as upstream, gateway(upstream, api_key="sk-of-the-gateway") as served:
        assert parts(await talk(served.port, to_embeddings(asked("x"))))[0] == 200
        assert parts(await talk(served.port, to_embeddings(asked([[1, 2]]))))[0] == 400  # relayed
        headers = {"Content_Type": "text/plain", "Origin": "http://evil.example"}
        assert status(await talk(served.port, to_embeddings(asked("x"), **headers))) == 415
    assert [headers["Authorization"] for headers in upstream.headers] == ["Bearer sk-of-the-gateway"] * 2


# --- what is relayed

TOKENS = [[1, 2, 3], [4]]
RELAYED = {
    "tokens": (asked(TOKENS[0]), "input"),
    "lists of tokens": (asked(TOKENS), "input"),
    "an empty list": (asked([]), "input"),
    "an empty text": (asked(["a", ""]), "input"),
    "no text": (asked(None), "input"),
    "mixed": (asked(["a", 1]), "input"),
    "3,000 texts": (asked(["a"] * 3_000), "input"),
    "no dimensions": (asked("a", dimensions=0), "dimensions"),
    "true dimensions": (asked("a", dimensions=True), "dimensions"),
    "a fraction of a dimension": (asked("a", dimensions=2.0), "dimensions"),
    "many dimensions": (asked("a", dimensions=10**30), "dimensions"),
    "null dimensions": (asked("a", dimensions=None), "dimensions"),
    "another encoding": (asked("a", encoding_format="int8"), "encoding_format"),
    "a list as encoding": (asked("a", encoding_format=["float"]), "encoding_format"),
    "a number as user": (asked("a", user=5), "user"),
    "an unknown field": (asked("a", late_chunking=True), "late_chunking"),
    "an unknown empty field": (asked("a", late_chunking=None), "late_chunking"),
    "an odd field": (asked("a", **{"<b>": 1}), "another field"),
    "a number as model": (json.dumps({"model": 5, "input": "a"}).encode(), "model"),
    "an empty model": (json.dumps({"model": "", "input": "a"}).encode(), "model"),
    "no model": (b'{"input": "a"}', None),
    "no object": (b'["a"]', None),
    "no JSON": (b'{"model": "m", "input": "a"', None),
    "half a pair": (b'{"model": "m", "input": "a\\ud800"}', None),
    "a number beyond floats": (b'{"model": "m", "input": "a", "dimensions": 1e400}', None),
    "nothing": (b"", None),
}


@pytest.mark.parametrize("name", RELAYED)
async def test_what_only_the_endpoint_can_judge_is_relayed_unchanged_with_its_error(name):
    raw, field = RELAYED[name]

    async def refuse(_request):
        return aiohttp.web.json_response({"error": {"message": "theirs"}}, status=422, headers={"X-Theirs": "1"})

    async with recorder() as upstream, gateway(upstream.url) as served:
        upstream.answer = refuse
        answer = await talk(served.port, to_embeddings(raw))
        assert served.stats().alone_by_field == ({field: 1} if field else {})
        assert served.stats().forwarded == 1
    assert (status(answer), error_in(answer)) == (422, {"message": "theirs"})
    assert parts(answer)[1]["x-theirs"] == "1"
    assert [(path, body) for _, path, _, body in upstream.requests] == [("/v1/embeddings", raw)]


@each(
    "given",
    [
        {"X_Microbatch_Batch": "no"},
        {"Content_Encoding": "gzip"},
        {"Content_Encoding": "identity"},
        {"Content_Type": "application/octet-stream", "Authorization": "Bearer theirs"},
        {"path": "/v1/embeddings?key=abcdefgh12345678"},
    ],
)
async def test_requests_that_are_not_to_be_read_are_relayed_unchanged(given):
    raw = asked("a")
    raw = gzip.compress(raw) if given.get("Content_Encoding") == "gzip" else raw
    async with recorder() as upstream, gateway(upstream.url) as served:
        assert status(await talk(served.port, post(raw, **{"path": "/v1/embeddings", **given}))) == 203
    assert [body for *_, body in upstream.requests] == [raw]


async def test_a_control_header_with_another_word_is_refused():
    async with recorder() as upstream, gateway(upstream.url) as served:
        answer = await talk(served.port, to_embeddings(asked("a"), X_Microbatch_Cache="perhaps"))
    assert (status(answer), error_in(answer)["code"]) == (400, "invalid_header")
    assert upstream.requests == []


async def test_the_operators_model_is_that_of_requests_that_name_none():
    connection = {"embedding_model": EMBEDDER}
    async with embedding_upstream() as upstream, gateway(upstream, model=MODEL, connection=connection) as served:
        for fields in ({"input": "x"}, {"input": "y", "model": "another"}, {"input": ["z"]}):
            answer = parts(await talk(served.port, to_embeddings(json.dumps(fields).encode())))
            assert answer[0] == 200
            assert answer[2]["model"] == fields.get("model", EMBEDDER)
    assert [body["model"] for body in upstream.calls] == [EMBEDDER, "another", EMBEDDER]


@each("upstream_path, more", [("/openai", {"query": {"api-version": "2024-10-21"}}), ("/v1", {})])
async def test_the_deployment_in_azures_path_is_the_model_of_requests_that_name_none(upstream_path, more):
    async with embedding_upstream() as upstream:
        address = upstream.base_url.removesuffix("/v1") + upstream_path
        async with gateway(address, policy=PATIENT, **more) as served:
            path = "/openai/deployments/my-own/embeddings?api-version=2024-10-21"
            requests = (post(json.dumps({"input": text}).encode(), path=path) for text in ("a", "b"))
            answers = await together(served, 2, *(talk(served.port, request) for request in requests))
    assert [parts(answer)[0] for answer in answers] == [200, 200]
    assert upstream.paths == [path if upstream_path == "/openai" else "/v1/embeddings"]
    assert [body["model"] for body in upstream.calls] == ["my-own"]


# --- what goes wrong


async def test_a_text_that_the_endpoint_refuses_fails_its_request_and_no_other():
    async with embedding_upstream() as upstream, gateway(upstream, policy=PATIENT) as served, sdk(served) as client:
        lists = [["good", REFUSED, "also good"], *([f"a{number}", f"b{number}"] for number in range(5))]
        error, *others = await together(served, 13, *(embed(client, texts) for texts in lists))
        assert others == [right(texts) for texts in lists[1:]]
        direct = await _direct_error(upstream)
    assert (error.status_code, error.code, error.param, error.type) == direct
    assert error.response.headers["x-should-retry"] == "false"
    assert error.response.headers["x-request-id"].startswith("req_")
    assert len(upstream.inputs(upstream.calls[0])) == 13


async def _direct_error(upstream):
    async with openai.AsyncOpenAI(base_url=upstream.base_url, api_key="k") as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await embed(client, REFUSED)
    return caught.value.status_code, caught.value.code, caught.value.param, caught.value.type


@each(
    "code, error, headers, kind, calls",
    [
        (401, {"message": "Wrong key.", "code": "invalid_api_key"}, {}, openai.AuthenticationError, 1),
        (404, {"message": "No model.", "code": "model_not_found"}, {}, openai.NotFoundError, 1),
        (429, {"message": "Slower."}, {"retry-after-ms": "20"}, openai.RateLimitError, 2),
        (429, {"message": "No credit.", "code": "insufficient_quota"}, {}, openai.RateLimitError, 1),
        (500, {"message": "Broken."}, {}, openai.InternalServerError, 2),
    ],
)
async def test_errors_are_those_of_the_endpoint(code, error, headers, kind, calls):
    async with embedding_upstream() as upstream, gateway(upstream, retry=QUICK_RETRY) as served, sdk(served) as client:
        upstream.refusal = code, error, headers
        with pytest.raises(kind) as caught:
            await embed(client, "x")
    found = caught.value
    assert (found.status_code, found.code, found.body["message"]) == (code, error.get("code"), error["message"])
    assert found.response.headers["x-request-id"].startswith("req_")
    assert found.response.headers["x-should-retry"] == "false"
    assert len(upstream.calls) == calls
    assert found.response.headers.get("retry-after-ms") == headers.get("retry-after-ms")


async def test_the_time_of_a_request_is_limited():
    settings = GatewaySettings(request_timeout=0.05)
    async with embedding_upstream() as upstream, gateway(upstream, settings=settings) as served:
        upstream.go.clear()
        answer = await talk(served.port, to_embeddings(asked(["a", "b"])))
    assert (status(answer), error_in(answer)["code"]) == (504, "deadline_exceeded")


async def test_an_upstream_that_cannot_be_reached_is_a_502():
    async with gateway("http://127.0.0.1:9/v1", retry=ONE_ATTEMPT) as served:
        answer = await talk(served.port, to_embeddings(asked("a")))
    assert (status(answer), error_in(answer)["code"]) == (502, "upstream_unreachable")


def _swapped(data):
    return [{**element, "index": data[at - 1]["index"]} for at, element in enumerate(data)]


SPOILED = {
    "another order": lambda data: data[::-1],
    "an index twice": lambda data: [{**element, "index": 0} for element in data],
    "one missing": lambda data: data[:-1] if len(data) > 1 else data,
    "one too many": lambda data: [*data, {**data[0], "index": len(data)}] if len(data) > 1 else data,
    "an index beyond the end": lambda data: (
        [{**element, "index": element["index"] + 1} for element in data] if len(data) > 1 else data
    ),
    "another length": lambda data: [{**data[0], "embedding": [0.5]}, *data[1:]] if len(data) > 1 else data,
}


@pytest.mark.parametrize("name", SPOILED)
async def test_a_wrong_index_never_gives_a_client_the_vector_of_another(name):
    async with (
        embedding_upstream() as upstream,
        gateway(upstream, policy=PATIENT, retry=QUICK_RETRY) as served,
        sdk(served) as client,
    ):
        upstream.spoil = SPOILED[name]
        texts = [f"t{number}" for number in range(6)]
        create = client.embeddings.create
        found = await together(served, 6, *(create(model=EMBEDDER, input=text) for text in texts))
        # Calls that had to be made again are paid for by those whom they were made for.
        assert sum(answer.usage.prompt_tokens for answer in found) == upstream.tokens
    assert [answer.data[0].embedding for answer in found] == [vector_of(text).tolist() for text in texts]
    assert (len(upstream.calls) == 1) == (name == "another order")


@each("failing", [{0}, {1, 4}, {0, 1, 2, 3, 4, 5}])
async def test_a_text_that_never_gets_a_sound_vector_fails_its_request_alone(failing):
    bad = {f"t{number}" for number in failing}

    def spoil(data):
        return [
            {**each, "embedding": None} if text in bad else each
            for each, text in zip(data, upstream.calls[-1]["input"], strict=True)
        ]

    async with (
        embedding_upstream() as upstream,
        gateway(upstream, policy=PATIENT, retry=QUICK_RETRY) as served,
        sdk(served) as client,
    ):
        upstream.spoil = spoil
        texts = [f"t{number}" for number in range(6)]
        found = await together(served, 6, *(embed(client, text) for text in texts))
    for text, vectors in zip(texts, found, strict=True):
        if text in bad:
            assert isinstance(vectors, openai.InternalServerError), text
            assert vectors.status_code == 502
        else:
            assert vectors == right(text)


async def test_a_client_that_leaves_withdraws_its_texts():
    async with embedding_upstream() as upstream, gateway(upstream, policy={"max_wait": 60}) as served:
        async with connection(served.port) as (_, writer):
            writer.write(to_embeddings(asked(["gone 1", "gone 2", "gone 3"])))
            await until(lambda: served.stats().queued == 3)
        await until(lambda: served.stats().queued == 0)
        staying = asyncio.gather(*(talk(served.port, to_embeddings(asked(f"stays {number}"))) for number in range(4)))
        await until(lambda: served.stats().queued == 4)
        served.batcher.flush()
        answers = await staying
        assert [status(answer) for answer in answers] == [200] * 4
        assert served.stats().cancelled == 3
    assert sorted(upstream.texts) == [f"stays {number}" for number in range(4)]


@each("number", [1, 2, 300])
async def test_a_client_that_leaves_ends_a_call_that_nobody_else_waits_for(number):
    async with embedding_upstream() as upstream, gateway(upstream) as served:
        upstream.go.clear()
        async with connection(served.port) as (_, writer):
            writer.write(to_embeddings(asked([f"gone {place}" for place in range(number)])))
            await until(lambda: upstream.calls)
        await until(lambda: served._serving == 0)
        await until(lambda: served.stats().in_flight == 0)
        assert served.stats().cancelled == number
        upstream.go.set()
        assert status(await talk(served.port, to_embeddings(asked("stays")))) == 200


# --- what comes back


async def test_headers_say_how_the_answer_came_about():
    async with (
        embedding_upstream() as upstream,
        gateway(upstream, cache=mb.MemoryCache(), policy={"max_wait": 0}) as served,
    ):
        first = parts(await talk(served.port, to_embeddings(asked(["a", "b"]))))
        again = parts(await talk(served.port, to_embeddings(asked(["b", "a"]))))
        partly = parts(await talk(served.port, to_embeddings(asked(["a", "c"]))))
        anew = parts(await talk(served.port, to_embeddings(asked(["a", "b"]), X_Microbatch_Cache="no")))
        refreshed = parts(await talk(served.port, to_embeddings(asked(["a", "b"]), X_Microbatch_Cache="refresh")))
    routes = [headers["x-microbatch-route"] for _, headers, _ in (first, again, partly, anew, refreshed)]
    assert routes == ["batch", "cache", "single", "batch", "batch"]
    assert [headers["x-microbatch-batch-size"] for _, headers, _ in (first, again)] == ["2", "2"]
    assert first[1]["x-request-id"] == "req_1"
    used = [body["usage"]["prompt_tokens"] for _, _, body in (first, again, partly)]
    assert used == [tokens_of("a") + tokens_of("b"), 0, tokens_of("c")]
    assert [element["embedding"] for element in again[2]["data"]] == [
        element["embedding"] for element in reversed(first[2]["data"])
    ]
    assert len(upstream.calls) == 4


async def test_numbers_are_those_of_the_upstream():
    numbers = [0.1, -0.9876543, 1e-07, 0.012345678, 1.0, 0.0, 3.4028235e38]

    def spoil(data):
        return [{**element, "embedding": numbers} for element in data]

    async with embedding_upstream() as upstream, gateway(upstream) as served:
        upstream.spoil = spoil
        answer = parts(await talk(served.port, to_embeddings(asked("x"))))
    found = answer[2]["data"][0]["embedding"]
    assert array("f", found) == array("f", numbers)
    assert [number for number in found if number in numbers] == [1.0, 0.0]


@each("encoding", ["float", "base64"])
async def test_a_large_answer_comes_whole(encoding):
    dimensions = 256
    texts = [f"t{number}" for number in range(2_048)]
    assert len(texts) * dimensions > 10 * AT_ONCE
    async with embedding_upstream() as upstream, gateway(upstream) as served, sdk(served) as client:
        answer = await client.embeddings.with_raw_response.create(
            model=EMBEDDER, input=texts, dimensions=dimensions, encoding_format=encoding
        )
        assert answer.headers["x-microbatch-route"] == "batch"
        body = json.loads(answer.content)
        assert body["usage"]["prompt_tokens"] == upstream.tokens
    assert [element["index"] for element in body["data"]] == list(range(2_048))
    for text, element in zip(texts, body["data"], strict=True):
        found = element["embedding"]
        if encoding == "base64":
            found = array("f", base64.b64decode(found))
        assert array("f", found) == vector_of(text, dimensions)


async def test_a_client_that_does_not_read_a_large_answer_is_cut_off():
    settings = GatewaySettings(client_timeout=1)
    async with embedding_upstream() as upstream, gateway(upstream, settings=settings) as served:
        async with connection(served.port, limit=1024) as (reader, writer):
            writer.write(to_embeddings(asked([f"t{number}" for number in range(2_048)], dimensions=1_536)))
            await until(lambda: upstream.tokens)
            await until(lambda: served._serving == 0)
            # The unread rest of the answer is dropped, not kept.
            await until(lambda: served.connections._count == 0)
            received = b""
            with suppress(ConnectionError):
                while chunk := await reader.read(65_536):
                    received += chunk
            assert not received.endswith(b"0\r\n\r\n")
        assert status(await talk(served.port, to_embeddings(asked("x")))) == 200


# --- money


async def test_a_budget_in_dollars_takes_a_model_whose_answers_have_no_tokens():
    prices = {EMBEDDER: mb.Price(1_000.0, 0.0)}
    async with embedding_upstream() as upstream, gateway(upstream, budget=mb.Budget(usd=0.05), prices=prices) as served:
        answered = 0
        while status(answer := await talk(served.port, to_embeddings(asked(f"a b c {answered}")))) == 200:
            answered += 1
        found = parts(answer)
        spent = served.stats().budget.spent_usd
    assert (found[0], found[2]["error"]["code"]) == (429, "insufficient_quota")
    assert found[1]["x-should-retry"] == "false"
    assert 5 <= answered <= 8
    assert spent == pytest.approx(upstream.tokens * 1_000 / 1e6)
    assert spent <= 0.05
    assert math.isclose(served.stats().cost_usd, spent)


async def test_a_model_without_a_price_is_the_clients_mistake_where_there_is_a_budget():
    prices = {MODEL: mb.Price(1.0, 1.0)}
    async with embedding_upstream() as upstream, gateway(upstream, budget=mb.Budget(usd=1), prices=prices) as served:
        answer = await talk(served.port, to_embeddings(json.dumps({"model": "unheard-of", "input": "x"}).encode()))
    assert status(answer) == 400
    assert upstream.calls == []


# --- what operators see


async def test_embeddings_are_logged_counted_and_shown_as_chat_completions_are(tmp_path):
    log, prices = tmp_path / "access.jsonl", {EMBEDDER: mb.Price(1_000.0, 0.0)}
    secret = "words that no log may have"
    async with embedding_upstream() as upstream:
        watched = gateway(upstream, policy=PATIENT, access_log=str(log), prices=prices, cache=mb.MemoryCache())
        async with watched as served, aiohttp.ClientSession() as session:
            client = Client(served, session)
            bodies = [{"model": EMBEDDER, "input": [f"{secret} {number}", f"more {number}"]} for number in range(3)]
            answers = await together(served, 6, *(client.post(body, "/v1/embeddings") for body in bodies))
            again = await client.post(bodies[0], "/v1/embeddings")
            (refused,) = await together(served, 1, client.post({"model": EMBEDDER, "input": REFUSED}, "/v1/embeddings"))
            alone = await client.post({"model": EMBEDDER, "input": [[1, 2]]}, "/v1/embeddings")
            text, samples = await metrics(session, client.root)
            hour = await client.hour()
            stats = served.stats()
    caller = answers[0][1]["X-Microbatch-Caller"]
    assert [answer[0] for answer in (*answers, again, refused, alone)] == [200] * 4 + [400] * 2
    assert len(upstream.calls) == 3
    spent = upstream.tokens * 1_000 / 1e6

    found = lines(log)
    assert [line["route"] for line in found] == ["batch"] * 3 + ["cache", None, "forward"]
    assert [line["reason"] for line in found] == [None] * 4 + ["BadRequest", "upstream"]
    assert {(line["model"], line["tenant"], line["path"]) for line in found} == {(EMBEDDER, caller, "/v1/embeddings")}
    assert {line["batch_size"] for line in found[:4]} == {6}
    assert sum(line["prompt_tokens"] for line in found[:4]) == upstream.tokens
    assert sum(line["cost_usd"] for line in found[:4]) == pytest.approx(spent)
    assert [line["upstream_id"] for line in found[:3]] == ["req_1"] * 3
    assert not any(line["estimated"] for line in found[:4])

    assert served_requests(samples, route="batch", status="200") == 3
    assert served_requests(samples, route="cache", status="200") == 1
    assert served_requests(samples, route="none", status="400", reason="BadRequest") == 1
    assert served_requests(samples, route="forward", status="400", reason="upstream") == 1
    labels = {"model": EMBEDDER, "tenant": caller}
    assert samples["http_caller_requests_total", *sorted({**labels, "status": "200"}.items())] == 4
    assert samples["caller_cost_usd_total", *sorted(labels.items())] == pytest.approx(spent)

    requests, errors, calls, saved, cost, _, unpriced = totals(hour)
    assert (requests, errors, calls, unpriced) == (6, 2, 3, 0)
    assert saved == 6 - 1 - 3  # a refusal counts for nothing
    assert cost == pytest.approx(stats.cost_usd) == pytest.approx(spent)
    assert [row[0] for row in hour["models"]] == [EMBEDDER]
    assert secret not in text + log.read_text("utf-8")


async def test_a_client_that_leaves_is_in_the_log(tmp_path):
    log = tmp_path / "access.jsonl"
    async with (
        embedding_upstream() as upstream,
        gateway(upstream, policy={"max_wait": 60}, access_log=str(log)) as served,
    ):
        async with connection(served.port) as (_, writer):
            writer.write(to_embeddings(asked("gone")))
            await until(lambda: served.stats().queued)
        await until(lambda: served._serving == 0)
    ((status, reason),) = [(line["status"], line["reason"]) for line in lines(log)]
    assert (status, reason) == (499, "disconnected")
