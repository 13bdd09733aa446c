"""A cached answer, as stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from microbatch.embedding.vectors import vector_of
from microbatch.errors import StorageError
from microbatch.messages import Usage

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable


DEFAULT_TTL: Final = 7 * 24 * 3600.0  # seconds for which answers are valid by default
MAX_CLOCK_SKEW: Final = 60.0  # seconds by which the clocks of processes that share a cache may differ


VECTOR_KIND: Final = b"embedding"

_Digest = Annotated[bytes, msgspec.Meta(min_length=1, max_length=hashlib.blake2b.MAX_DIGEST_SIZE)]


class Entry1(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """An answer in the cache, as earlier releases wrote it.

    Attributes:
        key: Its key. It shows when a store returns another key's value, as a connection out of step does.
        stored_at: Seconds since 1970.
        expires_at: Seconds since 1970; None for never.
        prompt_tokens: Of a call for this answer alone, as are the next two.
        body: The endpoint's JSON, for requests whose answer is more than a text; else None.
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
        """Usage of a call for this answer alone."""
        return Usage(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def json(self) -> dict[str, Any] | None:
        """Return the endpoint's JSON, a new copy each time."""
        return None if self.body is None else msgspec.json.decode(self.body, type=dict[str, Any])


class Entry(Entry1, frozen=True, array_like=True, tag=2):
    """An answer in the cache; earlier releases read it as a miss.

    Attributes:
        batch_size: Requests in the call that answered.
        lane_kind: Names the kind of the lane, as `Keys.masked` makes it of `LaneKind.digest`; None for requests that go alone by their
            form. `VECTOR_KIND` for the vector of a text, which is in `body` as 32-bit floats, little-endian.
        tenant: Digest of the tenant, as `Keys.tenant_digest` makes it; None for none.
    """

    batch_size: int = 1
    lane_kind: _Digest | None = None
    tenant: bytes | None = None

    @property
    def is_vector(self) -> bool:
        """True if it is the vector of a text."""
        return self.lane_kind == VECTOR_KIND

    def vector(self) -> array[float] | None:
        """Return the vector; None if it is none."""
        if not self.is_vector or self.body is None:
            return None
        try:
            return vector_of(self.body)
        except ValueError:
            return None

    def json(self) -> dict[str, Any] | None:
        """See `Entry1`; None for a vector."""
        return None if self.is_vector else super().json()


_decode = msgspec.msgpack.Decoder(Entry | Entry1).decode

encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
"""Return an `Entry` as bytes."""


def decode(value: bytes) -> Entry | Entry1 | None:
    """Return the entry stored as *value*, even if it is expired; None if it is damaged."""
    try:
        return _decode(value)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def read(value: bytes, key: bytes, now: float, *, alone: bool = False) -> Entry | None:
    """Return the entry stored as *value* under *key*; None if it is damaged, another key's, or expired.

    With *alone* also None unless the entry says that its answer is that of a call for it alone.
    """
    entry = decode(value)
    if entry is None or entry.key != key or (entry.expires_at is not None and entry.expires_at <= now):
        return None
    if alone and not (isinstance(entry, Entry) and entry.batch_size == 1):
        return None
    return entry if isinstance(entry, Entry) else Entry(*msgspec.structs.astuple(entry))


def checked_values(found: object, count: int) -> list[bytes | None]:
    """Return what a store has *found* as a list; raise `StorageError` if it is not *count* values, each bytes or None."""
    values: list[Any] = list(found) if isinstance(found, Iterable) else []
    if len(values) != count or not all(value is None or isinstance(value, bytes) for value in values):
        raise StorageError(f"it did not answer with {count} values, each bytes or None")
    return values
