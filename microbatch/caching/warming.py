"""Filling a cache before anybody asks."""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import TYPE_CHECKING

import msgspec

from microbatch.messages import Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from microbatch.messages import Messages


class Warmed(msgspec.Struct, frozen=True):
    """What came of warming a cache.

    Attributes:
        items: Requests.
        known: Those whose answers were in the cache already, or under way.
        asked: Those that were answered now.
        failed: Those that got no answer.
    """

    items: int = 0
    known: int = 0
    asked: int = 0
    failed: int = 0


def lasting(
    requests: Iterable[Request | Messages] | AsyncIterable[Request | Messages], ttl: float | None
) -> Iterator[Request] | AsyncIterator[Request]:
    """Return *requests* with answers that are good for *ttl* seconds, where they do not say; None leaves them be."""
    if isinstance(requests, AsyncIterable):
        return _lasting_async(requests, ttl)
    return (_lasting(request, ttl) for request in requests)


async def _lasting_async(requests: AsyncIterable[Request | Messages], ttl: float | None) -> AsyncIterator[Request]:
    async for request in requests:
        yield _lasting(request, ttl)


def _lasting(item: Request | Messages, ttl: float | None) -> Request:
    request = item if isinstance(item, Request) else Request(item)
    if ttl is None or request.ttl is not None:
        return request
    return msgspec.structs.replace(request, ttl=ttl)
