"""Decoding of one answer: from the text of a single reply, or the JSON of a combined reply's element, to an output.

Error messages are composed here from the schema and never quote the answer: error messages are logged, answers are not. The messages
of libraries may quote it, and differ from one release to the next.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import decimal
import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import msgspec

from microbatch.schema.optional import null_remover
from microbatch.schema.traverse import nodes
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

_MESSAGE = "message"

MAX_TRIES = 16
"""Fenced blocks, and values in prose, that are tried as the JSON of a single reply."""

# No `\s*` before the lazy part: the two would share the blanks in quadratically many ways.
_FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL | re.IGNORECASE)
# The end of an error of msgspec: "... - at `$.when`".
_PLACE = re.compile(r" - at `(\$(?:\.\w+|\[\d+\]|\[\.\.\.\])*)`\Z")
_BRACKET = re.compile(r"[{\[]")
_QUOTE = re.compile('"')
_scan = json.JSONDecoder().raw_decode
# The formats that msgspec gives its own types.
_FORMATS: Mapping[str, type] = {
    "date-time": dt.datetime,
    "date": dt.date,
    "time": dt.time,
    "duration": dt.timedelta,
    "uuid": uuid.UUID,
    "decimal": decimal.Decimal,
    "base64": bytes,
}
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


def decoder(read: Reader, schema: dict[str, Any], name: str = "its schema") -> Decoder:
    """Return a `Decoder` that reads with *read*; the text of an output is its JSON. *schema* and *name* are used in error messages.

    *read* does not see the nulls that stand for the absence of a property; see `schema/optional.py`.
    """
    without_nulls = null_remover(schema)

    def decode(raw: str) -> tuple[Any, str]:
        try:
            return read(raw if without_nulls is None else without_nulls(raw)), raw
        except _UNFIT as error:  # msgspec chains the error of a validator to its own
            raise _unfit(_reason(error, raw, schema), name, _place(error, schema)) from error.__cause__
        except Unfit as error:
            raise _unfit(str(error), name) from error.__cause__

    return decode


class Unfit(Exception):
    """The JSON does not fit; the message is a path and a rule. Raised by a `Reader` that knows them."""


def _unfit(reason: str, name: str, place: str | None = None) -> ValueError:
    error = ValueError(reason)
    # Known by this to be from here: a ValueError from the caller's type may quote the answer.
    vars(error)[_MESSAGE] = (
        f"the answer does not fit {name}: {reason}"
        if reason.startswith("$")
        else f"{reason} ({name}{'' if place is None else ' at ' + place})"
    )
    return error


def misfit_message(error: BaseException | None) -> str:
    """Return what is wrong with an answer whose decoding ended in *error*: the field, the rule and the type, without quoting it."""
    return str(getattr(error, _MESSAGE, "the answer does not fit output_type"))


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
        reason = misfit_in(raw, schema, formats=_FORMATS)
    except (msgspec.MsgspecError, RecursionError, TypeError, ValueError):
        # Types may add keywords that `misfit` does not expect, and may be refused before the JSON is read to its end.
        reason = None
    place = _place(error, schema)
    return reason or (f"{place}: not of its type" if place is not None else "the answer does not fit the type")


def _place(error: Exception, schema: dict[str, Any]) -> str | None:
    """Return where msgspec found *error*, if its message says so in names of *schema*."""
    found = _PLACE.search(str(error))
    if found is None:
        return None
    names = {name for node in nodes(schema) for name in node.get("properties", ())}
    return found[1] if names.issuperset(re.findall(r"\.(\w+)", found[1])) else None
