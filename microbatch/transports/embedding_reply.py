"""The reader of the reply to an embeddings call, vector by vector, since a reply may have megabytes.

Elements of sound JSON and of the documented shape are decoded by msgspec, one at a time; the rest of the reply is decoded without them.
What has another shape is read leniently: an index as a string or without one, a vector in a list of its own (llama.cpp's server below
addresses without `/v1`, where the reply is the list of elements), `NaN` among the numbers. A vector that cannot be read is None, and
does no harm to the others.
"""

from __future__ import annotations

import binascii
import math
import re
import sys
from array import array
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from microbatch.transports.error_parsing import read_fault
from microbatch.transports.exchange import MAX_ERROR_BYTES
from microbatch.transports.lenient import as_object, decode, decode_body, first_of, is_array
from microbatch.transports.reply_fields import read_prompt_usage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microbatch.messages import Usage
    from microbatch.transports.error_parsing import Fault

IndexedVector: TypeAlias = "tuple[int | None, array[float] | None]"

HEAD_BYTES: Final = 65_536
"""Bytes of a reply within which the list of vectors begins, if it is to be read in pieces."""

_MAX_NESTED: Final = 8  # objects inside an element beside its vector
_FLOAT_BYTES: Final = 4
_BASE64_QUANTUM: Final = 4

# The list, whose first element is an object: under `data`, or the whole reply.
_LIST: Final = re.compile(rb'(?:"data"\s*:\s*|\A(?:\xef\xbb\xbf)?\s*)\[\s*(?=\{)')
_AFTER: Final = re.compile(rb"\s*([,\]])\s*")
_NULL: Final = re.compile(rb"null\s*([,\]])\s*")


class _Element(msgspec.Struct):
    embedding: str | list[float] | None = None
    index: Any = None


class _Frame(msgspec.Struct):
    """A reply without its vectors."""

    data: Any = None
    embeddings: Any = None
    usage: Any = None
    usage_metadata: Any = msgspec.field(default=None, name="usageMetadata")
    meta: Any = None
    model: Any = None
    error: Any = None
    object: Any = None


_ELEMENT: Final = msgspec.json.Decoder(_Element)
_FRAME: Final = msgspec.json.Decoder(_Frame)


class EmbeddingReader:
    """Reads the body of a reply.

    Attributes:
        vectors: See `Embedded`; complete when `read` has ended. Empty if the body is no answer, which has at least one vector, readable
            or not.
        fault: The error that the body has instead of vectors, or None.
        usage: The tokens that the endpoint reports, or None.
        model: The model that answered, or None.
        in_base64: Whether a vector came in base64, and could be read.
    """

    def __init__(self, body: bytearray) -> None:
        self.vectors: list[IndexedVector] = []
        self.fault: Fault | None = None
        self.usage: Usage | None = None
        self.model: str | None = None
        self._body = body
        self.in_base64: bool = False
        self._answers = False  # whether there was a vector, readable or not

    def read(self) -> Iterator[None]:
        """Read the body, a vector for each step of the iterator; a reply of an unusual shape is read in one step."""
        found = _LIST.search(self._body, 0, HEAD_BYTES)
        start = end = 0
        if found is not None:
            start, at = self._body.index(b"[", found.start()), found.end()
            while at:
                at, end = self._take(at)
                yield
        taken = bool(self.vectors)
        if not end or not self._take_frame(start, end):
            self.vectors.clear()  # it was cut, or was another list
        if not taken or (end and not self.vectors):
            self._take_whole()
        if not self._answers or self.fault is not None:
            self.vectors.clear()
        if not self.vectors and self.fault is None and len(self._body) <= MAX_ERROR_BYTES:
            self.fault = read_fault(bytes(self._body), 200, hollow=True)

    def _take(self, start: int) -> tuple[int, int]:
        """Read the element at *start*; return where the next one begins, or 0, and where the list ends, or 0.

        Both are 0 if the element cannot be found in the bytes.
        """
        if null := _NULL.match(self._body, start):
            self.vectors.append((None, None))
            return (null.end(), 0) if null[1] == b"," else (0, null.start(1))
        # An element usually has no object inside it, so it ends with the first brace.
        end = start
        for _ in range(_MAX_NESTED):
            end = self._body.find(b"}", end) + 1
            after = _AFTER.match(self._body, end) if end else None
            if not end:
                break
            element = None if after is None else self._element(start, end)
            if element is not None and after is not None:
                self.vectors.append(element)
                return (after.end(), 0) if after[1] == b"," else (0, after.start(1))
        return 0, 0

    def _element(self, start: int, end: int) -> IndexedVector | None:
        """Return the vector of the element in these bytes; None if they hold no object."""
        with memoryview(self._body) as view, view[start:end] as part:
            try:
                element = _ELEMENT.decode(part)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                try:
                    fields = decode(bytes(part), number=float)
                except ValueError:
                    return None
                return self._loose(fields) if isinstance(fields, dict) else None
        value, index = element.embedding, read_index(element.index)
        if not isinstance(value, list):
            return index, self._vector(value)
        self._answers = True
        return index, _finite(array("f", value))

    def _loose(self, element: Any) -> IndexedVector:
        """Return the vector of an element that is not of the documented types; a list is a vector without an index."""
        if is_array(element):
            return None, self._vector(element)
        fields = as_object(element)
        return read_index(fields.get("index")), self._vector(fields.get("embedding"))

    def _vector(self, value: Any) -> array[float] | None:
        self._answers = self._answers or isinstance(value, str | list)
        if is_array(value):
            return from_numbers(value)
        vector = from_base64(value) if isinstance(value, str) else None
        self.in_base64 = self.in_base64 or vector is not None
        return vector

    def _take_frame(self, start: int, end: int) -> bool:
        """Read the reply without its list, which is in these bytes; return whether the list is the one that counts."""
        before, after = bytes(self._body[: start + 1]), bytes(self._body[end:])
        if b'"data"' not in before:
            return not after[1:].strip()
        frame = _read_frame(before + after)
        if frame is None or frame.data != []:
            return False
        self._note(frame)
        if frame.error or frame.object == "error":
            self.fault = read_fault(before + after, 200)
        return True

    def _take_whole(self) -> None:
        """Read a reply of an unusual shape."""
        try:
            reply = decode_body(bytes(self._body))
        except ValueError:
            return
        frame = _Frame(data=reply) if is_array(reply) else _frame_of(as_object(reply))
        self._note(frame)
        listed = frame.data if is_array(frame.data) and frame.data else frame.embeddings
        # Errors come as lists, too (Gemini's), and in the place of answers.
        if frame.error or not is_array(listed) or not any(_may_hold_a_vector(each) for each in listed):
            return
        self.vectors.extend(map(self._loose, listed))

    def _note(self, frame: _Frame) -> None:
        self.model = frame.model if isinstance(frame.model, str) and frame.model else None
        self.usage = read_prompt_usage(
            frame.usage, frame.usage_metadata, frame.meta, as_object(frame.meta).get("usage")
        )


def from_base64(text: str) -> array[float] | None:
    """Return the vector of little-endian 32-bit floats that *text* holds in base64; None if it holds none, or one is not finite."""
    vector = array("f")
    try:
        raw = binascii.a2b_base64(text + "=" * (-len(text) % _BASE64_QUANTUM), strict_mode=True)
    except ValueError:  # binascii.Error is one, as is the error for a text that is not ASCII
        return None
    if len(raw) % _FLOAT_BYTES:
        return None
    vector.frombytes(raw)
    if sys.byteorder == "big":
        vector.byteswap()
    return _finite(vector)


def from_numbers(value: list[Any]) -> array[float] | None:
    """Return the vector of a list of numbers, which may be the only one of another list; None if it is none."""
    inner = first_of(value)
    numbers = inner if is_array(inner) and len(value) == 1 else value
    if any(type(number) is bool for number in numbers):
        return None  # a number to the array
    try:
        return _finite(array("f", numbers))
    except (TypeError, OverflowError):
        return None


def read_index(value: Any) -> int | None:
    """Return an index that may be a string or have a decimal point; None if it is no whole number."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:  # noqa: PLR2004 more than any list has
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _finite(vector: array[float]) -> array[float] | None:
    # The sum of 32-bit numbers in 64 bits is finite if they are.
    return vector if vector and math.isfinite(sum(vector)) else None


def _may_hold_a_vector(element: Any) -> bool:
    return is_array(element) or "embedding" in as_object(element)


def _frame_of(fields: dict[str, Any]) -> _Frame:
    return msgspec.convert(fields, _Frame)


def _read_frame(raw: bytes) -> _Frame | None:
    try:
        return _FRAME.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return _frame_of(as_object(decode_body(raw)))
    except ValueError:
        return None
