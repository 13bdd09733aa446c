"""JSON as endpoints write it: what is sound is read at full speed, what is nearly sound is read all the same.

Proxies that are written in looser languages send `NaN`, control characters in strings, bytes that are no UTF-8, and characters beyond
the Basic Multilingual Plane as two halves in two events (elizaOS/eliza#30904). None of this is worth losing a reply for.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, Self

import msgspec

_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_UNREADABLE: Final = (ValueError, RecursionError)


class Number(float):
    """A number that knows how it was written: `str` of it is the JSON as it came."""

    def __new__(cls, written: str) -> Self:
        """Return the number that *written* stands for."""
        number = super().__new__(cls, written)
        number._written = written
        return number

    def __str__(self) -> str:
        """Return the number as it was written."""
        return self._written

    _written: str


def decode(data: bytes) -> Any:
    """Return the JSON value of *data*. Halves of surrogate pairs may stand in its texts; see `Joiner`.

    Raises:
        ValueError: It is no JSON by any reading.
    """
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    try:
        return json.loads(text.removeprefix("\ufeff"), parse_float=Number, parse_constant=str, strict=False)
    except _UNREADABLE as error:
        raise ValueError(type(error).__name__) from None  # the error holds the text


def decode_body(data: bytes) -> Any:
    """Return the JSON value of *data* in plain types, all of whose texts can be written as UTF-8.

    Raises:
        ValueError: It is no JSON by any reading.
    """
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, *_UNREADABLE):
        return _plain(decode(data))


class Joiner:
    """Puts the halves of surrogate pairs together that came in two pieces of a text; what has no other half becomes U+FFFD."""

    def __init__(self) -> None:
        self._half = ""

    def join(self, text: str) -> str:
        """Return *text*, after a half that was held back, and without one at its end that may still find its other half."""
        if not self._half and (text.isascii() or _SURROGATE.search(text) is None):
            return text
        text, self._half = self._half + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return _whole(text)

    def rest(self) -> str:
        """Return what is held back, now that nothing follows."""
        half, self._half = self._half, ""
        return "\ufffd" if half else ""


def _whole(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _whole(value) if _SURROGATE.search(value) else value
    if isinstance(value, Number):
        return float(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {_plain(name): _plain(each) for name, each in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return value
