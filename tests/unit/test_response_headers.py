"""What endpoints say of their limits, in every notation seen."""

import math

import pytest
from helpers import each
from hypothesis import given
from hypothesis import strategies as st

from microbatch.messages import Limits
from microbatch.testing.quota import go_duration
from microbatch.transports.response_headers import duration, read_limits, request_id, stated_wait


@each(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("14.7s", 14.7),
        ("6m0s", 360.0),
        ("12ms", 0.012),
        ("1h2m3.5s", 3723.5),
        ("2m59.56s", 179.56),
        ("1m12ms", 60.012),
        ("250us", 250e-6),
        ("250µs", 250e-6),
        ("7ns", 7e-9),
        ("0s", 0.0),
        ("5", 5.0),
        ("0.25", 0.25),
        (" 3s ", 3.0),
        ("", None),
        (None, None),
        ("soon", None),
        ("1s later", None),
        ("s", None),
        ("-1s", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("9" * 400 + "s", None),
        ("2026-11-23T00:00:00Z", None),
    ],
)
def test_durations_are_read_as_go_writes_them_or_as_seconds(text, seconds):
    assert duration(text) == (None if seconds is None else pytest.approx(seconds))


@given(st.floats(0, 100_000))
def test_what_our_own_endpoint_writes_is_read_back(seconds):
    assert duration(go_duration(seconds)) == pytest.approx(math.ceil(round(seconds * 1_000, 3)) / 1_000)


@given(st.text())
def test_any_text_is_a_duration_or_none(text):
    seconds = duration(text)
    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))


def test_all_six_are_read():
    headers = {
        "x-ratelimit-limit-requests": "1000",
        "x-ratelimit-remaining-requests": "998",
        "x-ratelimit-reset-requests": "120ms",
        "x-ratelimit-limit-tokens": "200000",
        "x-ratelimit-remaining-tokens": "199000",
        "x-ratelimit-reset-tokens": "6m0s",
    }
    assert read_limits(headers) == Limits(
        limit_requests=1_000,
        remaining_requests=998,
        reset_requests=pytest.approx(0.12),
        limit_tokens=200_000,
        remaining_tokens=199_000,
        reset_tokens=360.0,
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-ratelimit-limit-requests": "1000"},
        {"x-ratelimit-remaining-requests": "-1"},  # Azure: not known
        {"x-ratelimit-remaining-requests": "many", "x-ratelimit-remaining-tokens": "NaN"},
    ],
)
def test_what_does_not_tell_what_remains_tells_nothing(headers):
    assert read_limits(headers) is None


def test_what_cannot_be_read_is_left_out():
    headers = {"x-ratelimit-remaining-tokens": "17.9", "x-ratelimit-limit-tokens": "?", "x-ratelimit-reset-tokens": "?"}
    assert read_limits(headers) == Limits(remaining_tokens=17)


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        (b'{"retryDelay": "3.5s"}', 3.5),
        (b'{"metadata":{"raw":"{\\"retryDelay\\": \\"7s\\"}"}}', 7),
        (b'{"metadata":{"retry_after_seconds": 12}}', 12),
        (b'{"retry_after_ms": 500}', 0.5),
        (b"Please try again in 6m0s. Visit", 360),
        (b"Please try again in 20ms.", 0.02),
        (b"Please retry after 26 seconds.", 26),
        (b"Please retry in 31.66s.", 31.66),
        (b"Try again in 2 minutes", 120),
        (b"retryDelay: soon, try again in a moment", None),
        (b"", None),
    ],
)
def test_the_wait_that_a_body_asks_for(body, seconds):
    assert stated_wait(body) == seconds


def test_a_wait_that_is_no_number_is_none():
    assert stated_wait(b"try again in " + b"9" * 400 + b"s") is None
    assert stated_wait(b'"retry_after_hours": "' + b"9" * 308 + b'h"') is None


@each(
    ("header", "name"), [("req_1", "req_1"), ("a\udcffb", "a\ufffdb"), ("f\u00fcr", "f\u00fcr"), ("", ""), (None, None)]
)
def test_an_id_can_be_written_whatever_bytes_the_header_has(header, name):
    read = request_id({} if header is None else {"x-request-id": header})
    assert read == name
