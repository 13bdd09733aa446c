"""From the JSON of one answer to an output, or to words that say why not and quote nothing of the answer.

Answers are no matter for logs, and the messages of errors end there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

Reader = Callable[[str], Any]
"""Reads JSON as an output; what it raises may quote the JSON if it comes from msgspec."""
Decoder = Callable[[str], tuple[Any, str]]
"""Takes the JSON of one answer as the model wrote it; returns the output, and its text.

Raises:
    ValueError: It is not JSON, does not fit, or is blank text. The message holds no word of it.
    Exception: Whatever else a validator of the caller's type raises.
"""

_QUOTING = ("Invalid value", "Invalid enum value", "Object contains unknown field")
_PLACE = re.compile(r" - at `\$[^`]*`\Z")
_UNFIT = (msgspec.MsgspecError, RecursionError, UnicodeError)
_string = msgspec.json.Decoder(str).decode


def decode_text(raw: str) -> tuple[str, str]:
    """Decode a JSON string as a plain text, which is both the output and its text; a `Decoder`.

    Raises:
        ValueError: *raw* is no JSON string, or a blank one.
    """
    # A function by itself, since this is done for every answer and a method costs a fifth more.
    try:
        text = _string(raw)
    except _UNFIT as error:
        raise ValueError(_reason(error)) from _cause(error)
    if not text or text.isspace():
        raise ValueError("the answer is blank")
    return text, text


def decoder(read: Reader) -> Decoder:
    """Return what decodes JSON with *read*; the text of an output is its JSON."""

    def decode(raw: str) -> tuple[Any, str]:
        try:
            return read(raw), raw
        except _UNFIT as error:
            raise ValueError(_reason(error)) from _cause(error)

    return decode


def _cause(error: Exception) -> BaseException | None:
    """Return the caller's own error: validators that raise inside msgspec are the cause of what it raises."""
    return error.__cause__ if isinstance(error, msgspec.MsgspecError) else None


def _reason(error: Exception) -> str:
    """Return what *error* says without what it quotes."""
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    if isinstance(error, UnicodeError):
        return "the answer is not valid Unicode"  # its repr holds the whole answer
    said = str(error)
    if error.__cause__ is not None:
        kind = "refused by a validator of the type"
    elif said.startswith(_QUOTING):
        kind = "a value or field that the type does not have"
    else:
        return said
    place = _PLACE.search(said)
    return kind + (place[0] if place is not None else "")
