"""An answer as it is kept: all that is needed to give it again, and to tell whether it may be given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.messages import Usage

if TYPE_CHECKING:
    from collections.abc import Mapping


class Entry(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """An answer in the cache.

    Attributes:
        key: The key it is kept under. A store that hands out another's value, as a connection out of step does, is found out by it.
        text: The answer as the model wrote it.
        model: The model that answered, or None.
        stored_at: When it was put in, in seconds since 1970.
        expires_at: From when on it is good no longer; None for never.
        prompt_tokens: What asking for it alone would have cost.
        completion_tokens: Likewise.
        cached_tokens: Likewise.
        body: The endpoint's JSON, for requests whose answer is more than a text.
    """

    key: bytes
    text: str
    model: str | None
    stored_at: float
    expires_at: float | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    body: bytes | None = None

    @property
    def alone(self) -> Usage:
        """What asking for it alone would have cost."""
        return Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def json(self) -> dict[str, Any] | None:
        """Return the endpoint's JSON, a new copy each time."""
        return None if self.body is None else msgspec.json.decode(self.body, type=dict[str, Any])


_decode = msgspec.msgpack.Decoder(Entry).decode

encode = msgspec.msgpack.Encoder().encode
"""Returns an `Entry` as bytes."""


def body_of(body: Mapping[str, Any] | None) -> bytes | None:
    """Return an endpoint's JSON as an entry keeps it."""
    return None if body is None else msgspec.json.encode(body)


def read(value: bytes, key: bytes, now: float) -> Entry | None:
    """Return the entry that *value* is, None if it is none, is another key's, or is good no longer.

    Args:
        value: What a store had under *key*.
        key: The key.
        now: Seconds since 1970.
    """
    try:
        entry = _decode(value)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if entry.key != key or (entry.expires_at is not None and entry.expires_at <= now):
        return None
    return entry
