"""Decoding of one answer: from the text of a single reply, or the JSON of a combined reply's element, to an output.

Error messages are composed here from the schema and never quote the answer: error messages are logged, answers are not. The messages
of libraries may quote it, and differ from one release to the next.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import msgspec

from microbatch.schema.validate import misfit_in
from microbatch.thoughts import after_thoughts

Reader = Callable[[str], Any]
"""Reads JSON as an output; an error from msgspec may quote the JSON."""
Decoder = Callable[[str], tuple[Any, str]]
"""Takes the JSON of one answer as the model wrote it; returns the output and its text.

Raises:
    ValueError: The text is not JSON, does not fit, or is blank. The message does not quote it.
    Exception: An error of a validator of the caller's type.
"""

MAX_TRIES = 16
"""Fenced blocks, and values in prose, that are tried as the JSON of a single reply."""

# No `\s*` before the lazy part: the two would share the blanks in quadratically many ways.
_FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL | re.IGNORECASE)
_BRACKET = re.compile(r"[{\[]")
_QUOTE = re.compile('"')
_scan = json.JSONDecoder().raw_decode
_UNFIT = (msgspec.MsgspecError, RecursionError, UnicodeError)
_string = msgspec.json.Decoder(str).decode


class _Wrapper(msgspec.Struct):
    answer: msgspec.Raw


_wrapper = msgspec.json.Decoder(_Wrapper).decode


def decode_text(raw: str) -> tuple[str, str]:
    """Decode a JSON string as plain text, which is both the output and its text; a `Decoder`.

    Raises:
        ValueError: *raw* is not a JSON string, or a blank one.
    """
    try:
        text = _string(raw)
    except _UNFIT as error:
        raise ValueError(_reason(error, raw, {"type": "string"})) from error.__cause__
    if not text or text.isspace():
        raise ValueError("the answer is blank")
    return text, text


def decoder(read: Reader, schema: dict[str, Any]) -> Decoder:
    """Return a `Decoder` that reads with *read*; the text of an output is its JSON. *schema* is used in error messages."""

    def decode(raw: str) -> tuple[Any, str]:
        try:
            return read(raw), raw
        except _UNFIT as error:  # msgspec chains the error of a validator to its own
            raise ValueError(_reason(error, raw, schema)) from error.__cause__

    return decode


def follows(text: str, schema: Any) -> bool:
    """Return whether something in the text of a single reply is JSON that fits *schema*."""
    for raw in candidates(text):
        with contextlib.suppress(*_UNFIT):
            if misfit_in(raw, schema) is None:
                return True
    return False


def candidates(text: str) -> Iterator[str]:
    """Yield what may be the JSON of a single reply: its text after any thoughts, each fenced block, each value in brackets."""
    text = after_thoughts(text).strip().removeprefix("\ufeff")
    yield text
    for block in islice(_FENCE.finditer(text), MAX_TRIES):
        yield block[1].strip()
    # A string in prose is an answer only where there is no object that it could be a part of; a bare number never is.
    opening = _BRACKET if _BRACKET.search(text) else _QUOTE
    at = 0
    for _ in range(MAX_TRIES):  # each may read to the end of the text
        start = opening.search(text, at)
        if start is None:
            return
        try:
            _, at = _scan(text, start.start())
        except (ValueError, RecursionError):
            at = start.end()
        else:
            if at - start.start() < len(text):
                yield text[start.start() : at]


def unwrapped(raw: str) -> Iterator[str]:
    """Yield the member "answer" of *raw*, if it has one, then *raw* itself."""
    with contextlib.suppress(ValueError, RecursionError):
        yield bytes(_wrapper(raw).answer).decode()
    yield raw


def _reason(error: Exception, raw: str, schema: dict[str, Any]) -> str:
    """Return why *raw* was refused with *error*: a path and a rule of *schema* where possible, without quoting *raw*."""
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply"
    if isinstance(error, UnicodeError):
        return "the answer is not valid Unicode"  # its repr holds the whole answer
    if not isinstance(error, msgspec.ValidationError):
        return "the answer is not JSON"
    if error.__cause__ is not None:
        return "the answer is refused by a validator of the type"
    try:
        reason = misfit_in(raw, schema)
    except (msgspec.MsgspecError, RecursionError, TypeError, ValueError):
        # Types may add keywords that `misfit` does not expect, and may be refused before the JSON is read to its end.
        reason = None
    return reason or "the answer does not fit the type"
