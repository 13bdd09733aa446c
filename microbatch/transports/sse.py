"""Decodes server-sent events, by the WHATWG HTML standard, section 9.2.6. Of the fields only `data` is used."""

from __future__ import annotations

from typing import Final

from microbatch.errors import TransportError

MAX_EVENT_BYTES: Final = 8 * 1024 * 1024
_BOM: Final = b"\xef\xbb\xbf"


class SSEDecoder:
    """An incremental decoder, linear in the bytes fed. It holds one event at most."""

    def __init__(self) -> None:
        self._line = bytearray()  # the unfinished line
        self._data: list[bytes] = []  # data lines of the unfinished event
        self._held = 0  # bytes in `_data`
        self._at_start = True  # only the first line may have a byte order mark
        self._after_cr = False  # a line feed now would belong to the carriage return before it

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take the next bytes and return the data of the events that they complete.

        Data lines of one event are joined by newlines. Comments, other fields and events without a data line are dropped. An event
        with an empty data line is `b""`.

        Raises:
            TransportError: An event, or one line, is longer than `MAX_EVENT_BYTES`. The decoder must not be used any more.
        """
        if not chunk:
            return []
        if self._after_cr:
            chunk = chunk.removeprefix(b"\n")
        # A carriage return ends its line at once: a line feed may never follow.
        self._after_cr = chunk.endswith(b"\r")
        events: list[bytes] = []
        *ended, rest = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for end in ended:
            line = end
            if self._line:
                line = bytes(self._line + end)
                self._line.clear()
            self._end_line(line, events)
        self._line += rest
        self._check(self._line)
        return events

    def close(self) -> list[bytes]:
        """End the stream; return the data of an event without its closing blank line, if there is one.

        The standard discards such an event, but some servers close the connection after their last line. It may be incomplete, so use
        it only if it decodes. The decoder must not be used any more.
        """
        events: list[bytes] = []
        if self._line:
            self._end_line(bytes(self._line), events)
        self._end_event(events)
        return events

    def _check(self, line: bytes | bytearray) -> None:
        if self._held + len(line) > MAX_EVENT_BYTES:
            raise TransportError(f"the stream holds an event of more than {MAX_EVENT_BYTES} bytes")

    def _end_line(self, line: bytes, events: list[bytes]) -> None:
        self._check(line)
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            self._end_event(events)
            return
        name, _, value = line.partition(b":")
        if name == b"data":  # a comment has an empty name
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._held += len(value) + 1  # with the newline, or empty data lines would not count

    def _end_event(self, events: list[bytes]) -> None:
        if self._data:
            events.append(b"\n".join(self._data))
            self._data = []
            self._held = 0
