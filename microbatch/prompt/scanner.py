"""Scanner that finds the end of a JSON object in text that arrives in pieces, or the place where it stops being JSON.

The grammar is checked to the letter (RFC 8259), because the earliest sign of damage decides how much of a reply survives it.
Every character is looked at once, whatever the pieces.
"""

from __future__ import annotations

import re
from typing import Final

MORE: Final = -1
"""The object is valid so far and has not ended."""

BROKEN: Final = -2
"""The text is not JSON, whatever follows."""

MAX_DEPTH: Final = 64
"""Deeper nesting counts as damage. Strict schemas allow 10 levels; the bound keeps decoders from recursing too far."""

# A longer number counts as damage: each piece of it is copied again, so the cost would be quadratic.
_MAX_SCALAR = 1_000

SPACE: Final = r"[ \t\n\r]*+"
# Plain characters first: most strings have no escape and never enter the loop, which costs as much as all the rest.
STRING: Final = r'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+"'
_SCALAR_CHAR = "[-+.0-9A-Za-z]"
SCALAR: Final = (
    rf"(?!{_SCALAR_CHAR}{{{_MAX_SCALAR + 1}}})"
    r"(?:-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?|true|false|null)"
)

_string_body = re.compile(r'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+').match
_scalar_run = re.compile(f"{_SCALAR_CHAR}++").match
_scalar = re.compile(SCALAR).fullmatch
_space = re.compile(SPACE).match

# What may come next. In a string or a scalar, what follows it is remembered beside it.
_VALUE, _VALUE_OR_END, _KEY, _KEY_OR_END, _COLON, _COMMA_OR_END, _STRING, _ESCAPE, _HEX, _SCALAR_CHARS = range(10)

_CLOSING = {"{": "}", "[": "]"}


class ObjectScanner:
    """Scanner of one JSON object, fed from its opening brace on.

    Attributes:
        opened: Offsets from the object's own brace at which the objects and arrays not closed yet began.
    """

    __slots__ = ("_after_string", "_base", "_closers", "_expect", "_hex_left", "_scalar", "opened")

    def __init__(self) -> None:
        self.opened: list[int] = []
        self._base: int | None = None  # the object's place, counted from the start of the text at hand
        self._expect = _VALUE
        self._closers: list[str] = []
        self._after_string = _COLON
        self._scalar = ""
        self._hex_left = 0

    def feed(self, text: str, pos: int = 0) -> int:
        """Scan *text* from *pos*.

        Returns:
            The position just after the object's closing brace, `MORE`, or `BROKEN`. After the latter two all of *text* has
            been taken in; after an end or `BROKEN` the scanner is used up.
        """
        length = len(text)
        if self._base is None:
            self._base = pos
        while pos < length:
            if self._expect >= _STRING:
                # Here and not in `_inside`, because most pieces of a long reply are in a string from end to end.
                if self._expect == _STRING and (found := _string_body(text, pos)) is not None:
                    pos = found.end()
                    if pos == length:
                        break
                pos = self._inside(text, pos)
                if pos == BROKEN:
                    return pos
                continue
            found = _space(text, pos)
            pos = found.end() if found else pos
            if pos == length:
                break
            pos = self._token(text[pos], pos)
            if pos < 0 or not self._closers:
                return pos
        self._base -= length
        return MORE

    def feed_answer(self, text: str, start: int, pos: int) -> int:
        """Go on with *text* from *pos* on, as `feed` does, where a text begins that is a member's value.

        Args:
            text: See above.
            start: Where the object begins; it is sound up to *pos*.
            pos: The place behind the text's opening quote.
        """
        self._base = start
        self.opened.append(0)
        self._closers.append("}")
        self._expect, self._after_string = _STRING, _COMMA_OR_END
        return self.feed(text, pos)

    def _token(self, char: str, pos: int) -> int:
        """Take the structural character *char*, or enter a string or scalar; return the next position or `BROKEN`."""
        expect = self._expect
        if char == '"':
            if expect in (_KEY, _KEY_OR_END):
                self._after_string = _COLON
            elif expect in (_VALUE, _VALUE_OR_END):
                self._after_string = _COMMA_OR_END
            else:
                return BROKEN
            self._expect = _STRING
        elif expect in (_VALUE, _VALUE_OR_END):
            if char in "{[":
                if len(self._closers) == MAX_DEPTH:
                    return BROKEN
                self._closers.append(_CLOSING[char])
                self.opened.append(pos - (self._base or 0))
                self._expect = _KEY_OR_END if char == "{" else _VALUE_OR_END
            elif char == "]" and expect == _VALUE_OR_END:
                self._close()
            else:
                self._expect, self._scalar = _SCALAR_CHARS, ""
                return pos
        elif expect == _COLON and char == ":":
            self._expect = _VALUE
        elif expect == _COMMA_OR_END and char == ",":
            self._expect = _KEY if self._closers[-1] == "}" else _VALUE
        elif expect in (_COMMA_OR_END, _KEY_OR_END) and char == self._closers[-1]:
            self._close()
        else:
            return BROKEN
        return pos + 1

    def _close(self) -> None:
        self._closers.pop()
        self.opened.pop()
        self._expect = _COMMA_OR_END

    def _inside(self, text: str, pos: int) -> int:
        """Go on at the end of a string's plain part, in an escape or in a scalar; return the next position or `BROKEN`."""
        if self._expect == _STRING:
            return self._after_plain(text, pos)
        if self._expect == _SCALAR_CHARS:
            return self._in_scalar(text, pos)
        return self._in_escape(text[pos], pos)

    def _after_plain(self, text: str, pos: int) -> int:
        if text[pos] == '"':
            self._expect = self._after_string
        elif text[pos] == "\\":  # bad, or cut off by the end of this piece
            self._expect = _ESCAPE
        else:
            return BROKEN
        return pos + 1

    def _in_escape(self, char: str, pos: int) -> int:
        if self._expect == _HEX:
            if char not in "0123456789abcdefABCDEF":
                return BROKEN
            self._hex_left -= 1
            if not self._hex_left:
                self._expect = _STRING
        elif char == "u":
            self._expect, self._hex_left = _HEX, 4
        elif char in '"\\/bfnrt':
            self._expect = _STRING
        else:
            return BROKEN
        return pos + 1

    def _in_scalar(self, text: str, pos: int) -> int:
        found = _scalar_run(text, pos)
        if found:
            self._scalar += found[0]
            pos = found.end()
        if len(self._scalar) > _MAX_SCALAR:
            return BROKEN
        if pos == len(text):
            return pos
        if not _scalar(self._scalar):
            return BROKEN
        self._expect = _COMMA_OR_END
        return pos
