"""Rate limits and waits that responses name: the headers `x-ratelimit-*`, `retry-after` and its variants, words in the body."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final

from microbatch.messages import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping

# Go's notation: "6m0s", "14.7s", "12ms", "1h2m3.5s".
_DURATION: Final = re.compile(r"(?:(\d+(?:\.\d+)?)(h|m(?!s)|s|ms|us|µs|ns))")
_SECONDS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}

# In error bodies: Google's `"retryDelay": "3.5s"`, fields such as OpenRouter's `retry_after_seconds`, and the sentences of OpenAI ("try
# again in 6m0s"), Azure ("retry after 26 seconds"), Gemini ("retry in 31.6s") and Anthropic's proxies.
_DELAY_FIELD: Final = re.compile(
    rb"(?i)\bretry_?(?:delay|after|in)(?:_?(?P<unit>ms|milliseconds|s|seconds))?\\?\"\s*:\s*\\?\"?(?P<wait>[\d.]+[a-z\d.]*)"
)
_DELAY_TEXT: Final = re.compile(
    rb"(?i)\b(?:try again|retry(?:ing)?|wait)(?: your request)? (?:in|after|for|at least)(?: about| at least)? "
    rb"(?P<wait>[\d.]+(?:[hms\d.]*[hms])?)\b(?: ?(?P<unit>ms|milliseconds?|s|seconds?|minutes?|hours?)\b)?"
)
_UNITS: Final = {"ms": 1e-3, "milli": 1e-3, "min": 60.0, "hour": 3600.0}


def read_limits(headers: Mapping[str, str]) -> Limits | None:
    """Return the rate limits that *headers* report (looked up in any case), or None if they report none."""
    remaining_requests = _count(headers.get("x-ratelimit-remaining-requests"))
    remaining_tokens = _count(headers.get("x-ratelimit-remaining-tokens"))
    if remaining_requests is None and remaining_tokens is None:
        return None
    return Limits(
        limit_requests=_count(headers.get("x-ratelimit-limit-requests")),
        remaining_requests=remaining_requests,
        reset_requests=duration(headers.get("x-ratelimit-reset-requests")),
        limit_tokens=_count(headers.get("x-ratelimit-limit-tokens")),
        remaining_tokens=remaining_tokens,
        reset_tokens=duration(headers.get("x-ratelimit-reset-tokens")),
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an endpoint asks to wait, or None if it does not say, or says nonsense.

    `retry-after-ms` is OpenAI's; `llm_provider-retry-after` is LiteLLM's copy of the provider's header.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    for name in ("retry-after", "llm_provider-retry-after"):
        value = headers.get(name)
        wait = _number(value)
        if wait is None:
            wait = _until(value, headers.get("date"))
        if wait is not None:
            return wait
    return None


def stated_wait(body: bytes) -> float | None:
    """Return the seconds that the body of an error asks to wait, or None if it does not say."""
    found = _DELAY_FIELD.search(body) or _DELAY_TEXT.search(body)
    if found is None:
        return None
    wait, unit = duration(found["wait"].decode().rstrip(".")), (found["unit"] or b"").decode().lower()
    scale = next((seconds for name, seconds in _UNITS.items() if unit.startswith(name)), 1.0)
    return None if wait is None else _finite(wait * scale)


def duration(value: str | None) -> float | None:
    """Return a duration in seconds, written as Go does or as a plain number of seconds; None if it is neither."""
    text = (value or "").strip()
    parts = _DURATION.findall(text)
    if parts and "".join(amount + unit for amount, unit in parts) == text:
        return _finite(sum(float(amount) * _SECONDS[unit] for amount, unit in parts))
    return _number(text)


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the endpoint's id of a call, or None; bytes that are no UTF-8 become U+FFFD, as the id is stored and written."""
    value = headers.get("x-request-id")
    return None if value is None else value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _until(value: str | None, date: str | None) -> float | None:
    """Return the seconds until an HTTP date, counted from the response's own *date*, so that a skewed clock does no harm."""
    moment, now = _moment(value), _moment(date) or datetime.now(UTC)
    return None if moment is None else max(0.0, (moment - now).total_seconds())


def _moment(value: str | None) -> datetime | None:
    try:
        moment = parsedate_to_datetime(value or "")
    except (ValueError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)  # a date without a zone ("-0000") is UTC


def _count(value: str | None) -> int | None:
    read = _number(value)
    return None if read is None else int(read)


def _number(value: str | None) -> float | None:
    """Return a number of at least 0, or None if it is none."""
    try:
        read = float(value or "")
    except ValueError:
        return None
    return _finite(read) if read >= 0 else None


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
