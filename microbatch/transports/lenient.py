"""JSON values as endpoints write them: decoding that tolerates small defects, and access to values of unknown type.

Proxies written in loosely typed languages send `NaN`, control characters in strings, bytes that are not UTF-8, and characters beyond
the Basic Multilingual Plane as two halves in two events (elizaOS/eliza#30904). Sound JSON is decoded by msgspec, the rest leniently.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any, Final, TypeGuard, TypeVar, cast

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_UNREADABLE: Final = (ValueError, RecursionError)
_UTF_16: Final = "utf-16-le"


def as_object(value: Any) -> dict[str, Any]:
    """Return a JSON value if it is an object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def is_array(value: Any) -> TypeGuard[list[Any]]:
    """Return whether a JSON value is an array."""
    return isinstance(value, list)


def first_of(value: Any) -> Any:
    """Return the first element of a JSON array, or None; anything else as it is."""
    if not is_array(value):
        return value
    return value[0] if value else None


def decode(data: bytes, *, number: Callable[[str], float | str] = str) -> Any:
    """Return the JSON value of *data*, whose strings may contain halves of surrogate pairs; raise ValueError if there is none.

    *number* reads what has a decimal point, an exponent or too many digits, which stays as it was written otherwise.
    """
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")

    def whole(digits: str) -> int | float | str:
        try:
            return int(digits)
        except ValueError:  # more digits than Python converts
            return number(digits)

    try:
        return json.loads(
            text.removeprefix("\ufeff"), parse_float=number, parse_int=whole, parse_constant=str, strict=False
        )
    except _UNREADABLE as error:
        raise ValueError(type(error).__name__) from None  # the error holds the text


def is_json(data: bytes) -> bool:
    """Return whether *data* is a whole JSON value."""
    try:
        decode(data)
    except ValueError:
        return False
    return True


def decode_body(data: bytes) -> Any:
    """Return the JSON value of *data* in plain types, with strings that can be encoded as UTF-8; raise ValueError if there is none."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, *_UNREADABLE):
        return sound(decode(data, number=float))


def sound(value: T) -> T:
    """Return a JSON value with strings that can be encoded as UTF-8: halves of pairs are joined, unpaired ones become U+FFFD."""
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii() or _SURROGATE.search(text) is None:
        return value
    return cast("T", json.loads(text.encode(_UTF_16, "surrogatepass").decode(_UTF_16, "replace")))


class Joiner:
    """Joins halves of surrogate pairs that came in two pieces of a text; an unpaired half becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder(_UTF_16)("replace")
        self._holds = False  # whether the latest piece ended with a first half

    def join(self, text: str) -> str:
        """Return *text* with the half held back before it, without a half at its end that may still be completed."""
        if not self._holds and (text.isascii() or _SURROGATE.search(text) is None):
            return text
        joined = self._decoder.decode(text.encode(_UTF_16, "surrogatepass"))
        self._holds = self._decoder.getstate()[0] != b""
        return joined

    def rest(self) -> str:
        """Return what is held back, now that nothing follows."""
        self._holds = False
        return self._decoder.decode(b"", final=True)
