"""JSON as it is found in files: objects that strict decoders refuse, and the elements of an array in a stream."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NOT_UTF8: Final = "it is not UTF-8; for a file in another encoding give --encoding, such as cp1252 or latin-1"

_MAX_ELEMENT: Final = 1 << 27
_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
_LONE: Final = re.compile("[\ud800-\udfff]")
_STRING, _OPEN, _OPENING, _CLOSING, _COMMA = b'"', b"[", b"[{", b"]}", b","

_decode = msgspec.json.Decoder(dict[str, Any]).decode


def decode_object(raw: bytes) -> dict[str, Any]:
    r"""Return the object in *raw*.

    What JSON does not have, but Python and JavaScript write, is taken: NaN becomes None, infinities and numbers out of range become
    strings, as they are written, and half of a surrogate pair (`\ud800`) becomes U+FFFD.

    Raises:
        ValueError: It is not an object; the arguments are the problem, in the same words for all of a kind, and a detail or nothing.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(NOT_UTF8, f"byte 0x{raw[error.start]:02x} at {error.start + 1:,}") from None
    try:
        return _decode(text)
    except (ValueError, RecursionError):
        return _decode_leniently(text)


def _decode_leniently(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_float=_number, parse_constant=_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError("it is not JSON", f"{error.msg}, column {error.colno:,}") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise ValueError("it holds a number that is too long", str(error)) from None
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")  # noqa: TRY004 as all that is wrong
    written = json.dumps(value, ensure_ascii=False)
    return json.loads(_LONE.sub("\ufffd", written)) if _LONE.search(written) else value


def _number(text: str) -> float | str:
    value = float(text)
    return text if value in (float("inf"), float("-inf")) else value


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name


def elements(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the text of each element of the JSON array in *chunks*, holding one element and one chunk at a time.

    Raises:
        ValueError: It is not an array, or does not end as one.
    """
    rest, at, depth, found = b"", 0, 0, 0
    for chunk in chunks:
        rest += chunk
        start = 0  # of the element
        for token in _TOKEN.finditer(rest, at):
            mark, at = token[0], token.end()
            if mark == _STRING:  # it goes on in the next chunk
                at = token.start()
                break
            if depth == 0:
                if mark != _OPEN or found or rest[: token.start()].strip(b"\xef\xbb\xbf \t\r\n"):
                    raise ValueError("it is not one JSON array")
                start, depth = at, 1
            elif depth == 1 and mark in (_COMMA, b"]"):
                element = rest[start : token.start()]
                if mark == _COMMA or found or element.strip():
                    yield element
                found += 1
                start, depth = at, 1 if mark == _COMMA else 0
            elif mark in _OPENING:
                depth += 1
            elif mark in _CLOSING:
                depth -= 1
        else:
            at = len(rest)
        rest, at = rest[start:], at - start
        if len(rest) > _MAX_ELEMENT:
            raise ValueError("an element is longer than 128 MiB; a quote or a bracket may be missing")
    if depth or not found or rest.strip():
        raise ValueError("the JSON array does not end, or the file does not end with it")
