"""A provider's files and batches over HTTP: what is asked, what is tried again, and what is not."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from microbatch.errors import (
    AuthFailed,
    BadRequest,
    ConnectFailed,
    QuotaExhausted,
    RateLimited,
    ServerError,
    TransportError,
    TransportTimeout,
)
from microbatch.policy import RetryPolicy
from microbatch.spool.provider.api import OpenAIBatchApi, is_ambiguous
from microbatch.transports.chat_wire import BatchWire

BATCH = {"id": "batch_1", "status": "validating", "created_at": 5, "metadata": {"a": "b"}}


class Response:
    def __init__(self, status, body, headers):
        self.status = status
        self.headers = headers
        self._body = body

    async def chunks(self):
        for start in range(0, len(self._body), 7):
            if self._body[start : start + 1] == b"!":
                raise ConnectFailed("the connection broke")
            yield self._body[start : start + 7]


class Forward:
    """Says what the provider answers: a body, a status with headers, or an error."""

    def __init__(self, *answers):
        self._answers = list(answers)
        self.asked = []
        self.times = []

    @contextlib.asynccontextmanager
    async def __call__(self, method, path, headers, body=None):
        self.asked.append((method, path, dict(headers), body))
        self.times.append(asyncio.get_running_loop().time())
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, tuple):
            status, headers, error = answer
            yield Response(status, json.dumps({"error": error}).encode(), headers)
        else:
            yield Response(200, answer if isinstance(answer, bytes) else json.dumps(answer).encode(), {})


def api(forward, **policy):
    retry = RetryPolicy(**{"max_attempts": 3, "base": 1.0, "cap": 8.0, **policy})
    return OpenAIBatchApi(forward, BatchWire(None, where="host:1").refusal, retry=retry, draw=lambda: 1.0)


async def test_a_file_is_uploaded_as_a_form():
    forward = Forward({"id": "file-1"})
    assert await api(forward).upload("x.jsonl", b'{"a": "\xf0\x9f\xa7\xbf"}\n') == "file-1"
    ((method, path, headers, body),) = forward.asked
    assert (method, path) == ("POST", "/files")
    boundary = headers["Content-Type"].removeprefix("multipart/form-data; boundary=")
    assert (
        body
        == (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n'
            'Content-Type: application/jsonl\r\n\r\n{"a": "🧿"}\n\r\n'
            f"--{boundary}--\r\n"
        ).encode()
    )


async def test_a_batch_is_made_with_its_metadata():
    forward = Forward(BATCH)
    batch = await api(forward).create("file-1", {"job": "x"})
    assert (batch.id, batch.status, batch.created_at, batch.metadata) == ("batch_1", "validating", 5, {"a": "b"})
    ((method, path, _, body),) = forward.asked
    assert (method, path) == ("POST", "/batches")
    assert json.loads(body) == {
        "input_file_id": "file-1",
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"job": "x"},
    }


async def test_everything_else_is_asked_where_it_is():
    found = {**BATCH, "id": "batch_2", "metadata": {"job": "x"}}
    pages = {"data": [BATCH], "has_more": True}, {"data": [found], "has_more": True}
    forward = Forward(BATCH, *pages, b"content", {"deleted": True})
    asks = api(forward)
    assert (await asks.get("batch/1")).id == "batch_1"
    batch = await asks.find("job", "x", since=0.0)
    assert batch is not None
    assert batch.id == "batch_2"
    assert await asks.content("file-1") == b"content"
    await asks.delete("file-1")
    assert [(method, path) for method, path, _, _ in forward.asked] == [
        ("GET", "/batches/batch%2F1"),
        ("GET", "/batches?limit=100"),
        ("GET", "/batches?limit=100&after=batch_1"),
        ("GET", "/files/file-1/content"),
        ("DELETE", "/files/file-1"),
    ]
    assert {headers["Accept-Encoding"] for _, _, headers, _ in forward.asked} == {"identity"}


def failure(status, code=None, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, {"message": "no", "code": code}


TRANSIENT = [ConnectFailed("x"), TransportTimeout("x"), failure(429), failure(500), failure(503), failure(409)]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
async def test_what_time_may_heal_is_tried_again_after_growing_waits(error):
    forward = Forward(error, error, BATCH)
    assert (await api(forward).get("b")).id == "batch_1"
    first = forward.times[0]
    assert [time - first for time in forward.times] == [0.0, 1.0, 3.0]


async def test_in_the_end_the_last_error_is_raised_with_its_attempts():
    forward = Forward(*[failure(500)] * 3)
    with pytest.raises(ServerError) as caught:
        await api(forward).get("b")
    assert caught.value.attempts == len(forward.asked) == 3


async def test_waits_never_undercut_what_the_provider_asks_for_and_have_a_cap():
    forward = Forward(failure(429, retry_after="30"), failure(429), BATCH)
    await api(forward, base=9.0).get("b")
    first = forward.times[0]
    assert [time - first for time in forward.times] == [0.0, 38.0, 46.0]


async def test_whoever_asks_to_wait_for_minutes_is_taken_at_its_word():
    forward = Forward(failure(429, retry_after="121"))
    with pytest.raises(RateLimited):
        await api(forward).get("b")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (failure(400), BadRequest),
        (failure(404), BadRequest),
        (failure(401), AuthFailed),
        (failure(402), QuotaExhausted),
        (failure(429, "insufficient_quota"), QuotaExhausted),
        (failure(429, x_should_retry="false"), RateLimited),
        (b"<html>", TransportError),
    ],
)
async def test_what_time_does_not_heal_is_raised_at_once(answer, kind):
    forward = Forward(answer)
    with pytest.raises(kind) as caught:
        await api(forward).get("b")
    assert len(forward.asked) == 1
    assert "host:1" in str(caught.value) or kind is TransportError


async def test_an_answer_that_breaks_off_is_asked_for_again():
    forward = Forward(b"content!", b"content, whole")
    assert await api(forward).content("f") == b"content, whole"


@pytest.mark.parametrize(
    "error", [ConnectFailed("x"), TransportTimeout("x"), failure(500), failure(503), b"<html>"], ids=repr
)
async def test_a_batch_that_may_have_been_made_is_not_made_again(error):
    forward = Forward(error)
    with pytest.raises(TransportError) as caught:
        await api(forward).create("f", {})
    assert len(forward.asked) == 1
    assert is_ambiguous(caught.value)


async def test_a_batch_that_was_surely_not_made_is_tried_again_while_there_is_hope():
    forward = Forward(failure(429), BATCH)
    assert (await api(forward).create("f", {})).id == "batch_1"
    with pytest.raises(BadRequest) as caught:
        await api(Forward(failure(400))).create("f", {})
    assert not is_ambiguous(caught.value)


async def test_no_error_quotes_what_was_answered():
    for answer in (b'{"id": "secret-thing"', b'["secret-thing"]'):
        with pytest.raises(TransportError) as caught:
            await api(Forward(answer)).get("b")
        assert "secret" not in repr(caught.value)
        assert caught.value.__cause__ is None
