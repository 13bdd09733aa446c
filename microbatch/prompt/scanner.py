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
_begun_escape = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?").fullmatch
_scalar_run = re.compile(f"{_SCALAR_CHAR}++").match
_scalar = re.compile(SCALAR).fullmatch
_space = re.compile(SPACE).match

# States, named by the token that may come next. In a string, the state after it is kept beside it.
_VALUE, _VALUE_OR_END, _KEY, _KEY_OR_END, _COLON, _COMMA_OR_END, _STRING = range(7)

_CLOSING = {"{": "}", "[": "]"}


class ObjectScanner:
    """Scanner of one JSON object, fed from its opening brace on.

    Attributes:
        opened: Offsets from the object's own brace at which the objects and arrays not closed yet began.
    """

    def __init__(self) -> None:
        self.opened: list[int] = []
        self._base: int | None = None  # the object's place, counted from the start of the text at hand
        self._expect = _VALUE
        self._closers: list[str] = []
        self._after_string = _COLON
        self._unfinished = ""  # an escape or a scalar at the end of the text so far

    def feed(self, text: str, pos: int = 0) -> int:
        """Scan *text* from *pos*.

        Returns:
            The position just after the object's closing brace, `MORE`, or `BROKEN`. After the latter two all of *text* has
            been taken in; after an end or `BROKEN` the scanner is used up.
        """
        if self._base is None:
            self._base = pos
        held = 0
        if self._unfinished:
            held = len(self._unfinished)
            text, self._unfinished = self._unfinished + text, ""
            self._base += held
        length = len(text)
        while pos < length:
            in_string = self._expect == _STRING
            found = _string_body(text, pos) if in_string else _space(text, pos)
            if found:
                pos = found.end()
            if pos == length:
                break
            pos = self._leave_string(text, pos) if in_string else self._token(text, pos)
            if pos == BROKEN:
                return pos
            if not self._closers:
                return pos - held
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

    def _token(self, text: str, pos: int) -> int:
        """Take a structural character or a scalar, or enter a string; return the next position or `BROKEN`."""
        char, expect = text[pos], self._expect
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
                return self._take_scalar(text, pos)
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

    def _leave_string(self, text: str, pos: int) -> int:
        """Take the end of a string, or hold an escape that its text ends in; return the next position or `BROKEN`."""
        if text[pos] == '"':
            self._expect = self._after_string
            return pos + 1
        if not _begun_escape(text, pos):
            return BROKEN
        self._unfinished = text[pos:]
        return len(text)

    def _take_scalar(self, text: str, pos: int) -> int:
        """Take a scalar, or hold one that may go on in the next text; return the next position or `BROKEN`."""
        found = _scalar_run(text, pos)
        end = found.end() if found else pos
        if end - pos > _MAX_SCALAR:
            return BROKEN
        if end == len(text):
            self._unfinished = text[pos:]
        elif _scalar(text, pos, end):
            self._expect = _COMMA_OR_END
        else:
            return BROKEN
        return end
