"""The gateway answers odd bodies of clients and odd waits of endpoints with an error of its own kind, not with a failure."""

from __future__ import annotations

import json

import pytest

from microbatch.errors import RateLimited
from microbatch.gateway.chat_request import read_chat_request
from microbatch.gateway.errors import GatewayError, translate

DIGITS = b"9" * 5000  # more than Python converts


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": 1e999, ',
        b'{"a": 1e999} x',
        b'{"a": ' + DIGITS,
        b'{"a": ' + DIGITS + b"]",
        b'{"a": 1e999, "b": ' + b"[" * 10_000,
    ],
)
def test_a_body_that_is_no_json_is_the_clients_fault_whatever_numbers_are_in_it(raw: bytes) -> None:
    with pytest.raises(GatewayError, match="no JSON") as caught:
        read_chat_request(raw, model="m")
    assert (caught.value.status, caught.value.error["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("number", [b"1e999", DIGITS])
def test_a_number_that_python_cannot_hold_is_left_to_the_endpoint(number: bytes) -> None:
    raw = b'{"model": "m", "messages": [{"role": "user", "content": "x"}], "seed": ' + number + b"}"
    request = read_chat_request(raw, model=None)
    assert request.arguments is None
    assert request.body == raw


@pytest.mark.parametrize("seconds", [0.0, 0.25, 3e9, 1e308, float("inf")])
def test_a_wait_of_any_length_is_named(seconds: float) -> None:
    refusal = translate(RateLimited("slow", status=429, retry_after=seconds))
    assert refusal.response().status == 429
    assert int(refusal.headers["Retry-After"]) >= min(seconds, 2**31 - 1)
    assert json.loads(refusal.headers["retry-after-ms"]) >= min(seconds, 2**31 - 1) * 1000
