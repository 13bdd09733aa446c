"""Says where a request body is no JSON, and why."""

from __future__ import annotations

import codecs
import json
import re
from typing import Final

_MARKS: Final = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Strings are skipped, so that only constants of JavaScript outside of them are found.
_CONSTANT: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|(-?\b(?:NaN|Infinity)\b)', re.DOTALL)
# Pairs and other escapes are skipped, so that only halves of pairs are found.
_HALF: Final = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL)


def json_fault(raw: bytes) -> str:
    """Return the first fault of *raw*, which is no JSON in UTF-8, with its position; it quotes nothing of what clients wrote."""
    if raw.startswith(_MARKS):
        return "at byte 0 is a byte order mark; send UTF-8 without one"
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        surrogate = raw[error.start] == 0xED  # noqa: PLR2004 the first byte of halves in CESU-8
        return f"at byte {error.start} is no UTF-8" + (", but half of a surrogate pair" if surrogate else "")
    found, cause = len(text), ""
    try:
        json.loads(text, parse_int=float)  # int() refuses thousands of digits
    except json.JSONDecodeError as error:
        found, cause = error.pos, f": {error.msg.removesuffix(' at')}"
    except RecursionError:
        return "it is nested too deeply"
    constant = next((match for match in _CONSTANT.finditer(text, 0, found) if match[1]), None)
    if constant is not None:
        found, cause = constant.start(), f" is {constant[1]}, which JSON does not have"
    elif not cause:
        half = next((match for match in _HALF.finditer(text) if match[1]), None)
        if half is None:
            return "it cannot be read"
        found, cause = half.start(), " is half of a surrogate pair, which is no character"
    return f"at byte {len(text[:found].encode())}{cause}"
