"""From the JSON of one answer to an output, or to words that say why not and quote nothing of the answer.

Answers are no matter for logs, and the messages of errors end there. So the words are our own: those of a library may quote the
answer, and differ from one release to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from microbatch.schema.validate import misfit

Reader = Callable[[str], Any]
"""Reads JSON as an output; what it raises may quote the JSON if it comes from msgspec."""
Decoder = Callable[[str], tuple[Any, str]]
"""Takes the JSON of one answer as the model wrote it; returns the output, and its text.

Raises:
    ValueError: It is not JSON, does not fit, or is blank text. The message holds no word of it.
    Exception: Whatever else a validator of the caller's type raises.
"""

_UNFIT = (msgspec.MsgspecError, RecursionError, UnicodeError)
_string = msgspec.json.Decoder(str).decode
_any = msgspec.json.Decoder().decode
_STEPS, _STEPS_A_CHARACTER = 10_000, 8  # of looking for the place where an answer does not fit


def decode_text(raw: str) -> tuple[str, str]:
    """Decode a JSON string as a plain text, which is both the output and its text; a `Decoder`.

    Raises:
        ValueError: *raw* is no JSON string, or a blank one.
    """
    # A function by itself, since this is done for every answer and a method costs a fifth more.
    try:
        text = _string(raw)
    except _UNFIT as error:
        raise ValueError(_reason(error, raw, {"type": "string"})) from _cause(error)
    if not text or text.isspace():
        raise ValueError("the answer is blank")
    return text, text


def decoder(read: Reader, schema: dict[str, Any]) -> Decoder:
    """Return what decodes JSON with *read*; the text of an output is its JSON. *schema* serves to say why an answer does not fit."""

    def decode(raw: str) -> tuple[Any, str]:
        try:
            return read(raw), raw
        except _UNFIT as error:
            raise ValueError(_reason(error, raw, schema)) from _cause(error)

    return decode


def _cause(error: Exception) -> BaseException | None:
    """Return the caller's own error: validators that raise inside msgspec are the cause of what it raises."""
    return error.__cause__ if isinstance(error, msgspec.MsgspecError) else None


def _reason(error: Exception, raw: str, schema: dict[str, Any]) -> str:
    """Return why *raw* was refused with *error*: a place and a rule of *schema* if that tells, in any case without a word of *raw*."""
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    if isinstance(error, UnicodeError):
        return "the answer is not valid Unicode"  # its repr holds the whole answer
    if not isinstance(error, msgspec.ValidationError):
        return "the answer is not JSON"
    if error.__cause__ is not None:
        return "the answer is refused by a validator of the type"
    try:
        reason = misfit(_any(raw), schema, steps=_STEPS + _STEPS_A_CHARACTER * len(raw))
    except (msgspec.MsgspecError, RecursionError, TypeError, ValueError):
        # Types may add to their schema what `misfit` does not expect, and a type may be refused before the JSON is read to its end.
        reason = None
    return reason or "the answer does not fit the type"
