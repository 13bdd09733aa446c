"""What endpoints say of their rate limits: the `x-ratelimit-*` headers of OpenAI and all who copy them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

from microbatch.messages import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping

# Go's notation: "6m0s", "14.7s", "12ms", "1h2m3.5s".
_DURATION: Final = re.compile(r"(?:(\d+(?:\.\d+)?)(h|m(?!s)|s|ms|us|µs|ns))")
_SECONDS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def read_limits(headers: Mapping[str, str]) -> Limits | None:
    """Return what the headers say, or None if they say nothing that can be read.

    Args:
        headers: An answer's headers, looked up in any case.
    """
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


def duration(value: str | None) -> float | None:
    """Return a duration in seconds, written as Go does or as a plain number of seconds; None if it is neither."""
    text = (value or "").strip()
    parts = _DURATION.findall(text)
    if parts and "".join(amount + unit for amount, unit in parts) == text:
        return sum(float(amount) * _SECONDS[unit] for amount, unit in parts)
    return number(text)


def _count(value: str | None) -> int | None:
    read = number(value)
    return None if read is None else int(read)


def number(value: str | None) -> float | None:
    """Return a number of at least 0, or None if it is none."""
    try:
        read = float(value or "")
    except ValueError:
        return None
    return read if math.isfinite(read) and read >= 0 else None
