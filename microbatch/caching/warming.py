"""Filling a cache in advance."""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.messages import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from microbatch.messages import Messages, Requests


class Warmed(msgspec.Struct, frozen=True):
    """The outcome of warming a cache.

    Attributes:
        items: Number of requests.
        known: Requests whose answers were in the cache already, or under way.
        asked: Requests answered now.
        failed: Requests that got no answer.
    """

    items: int = 0
    known: int = 0
    asked: int = 0
    failed: int = 0


def lasting(requests: Requests, ttl: float | None) -> Iterator[Request[Any]] | AsyncIterator[Request[Any]]:
    """Return *requests* with *ttl*, in seconds, set on those that have none."""

    def with_ttl(item: Request[Any] | Messages) -> Request[Any]:
        request = item if isinstance(item, Request) else Request(item)
        return request if request.ttl is not None else msgspec.structs.replace(request, ttl=ttl)

    if isinstance(requests, AsyncIterable):
        return (with_ttl(item) async for item in requests)
    return map(with_ttl, requests)
