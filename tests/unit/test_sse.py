"""The event stream decoder: the standard's grammar, under any chunking."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.errors import TransportError
from microbatch.transports import sse
from microbatch.transports.sse import SSEDecoder


def decode(stream: bytes, cuts: list[int] | None = None) -> tuple[list[bytes], list[bytes]]:
    """Return the events, and what close() adds, of *stream* fed in pieces."""
    edges = [0, *sorted(cut for cut in cuts or [] if cut <= len(stream)), len(stream)]
    decoder = SSEDecoder()
    events = [event for a, b in itertools.pairwise(edges) for event in decoder.feed(stream[a:b])]
    return events, decoder.close()


def reference(stream: bytes) -> list[bytes]:
    """Decode the whole stream at once, in the plainest way the standard can be put."""
    lines = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    events, data = [], []
    for line in lines[:-1]:
        if line == b"":
            if data:
                events.append(b"\n".join(data))
            data = []
        elif line == b"data" or line.startswith(b"data:"):
            value = line[5:]
            data.append(value[1:] if value.startswith(b" ") else value)
    return events


ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])
LINES = st.one_of(
    st.sampled_from(
        [b"", b"", b"data", b"data:", b"data: [DONE]", b": keep-alive", b":", b"event: x", b"id: 1", b"database: no"]
    ),
    st.binary(max_size=12).map(lambda text: b"data: " + text.replace(b"\r", b".").replace(b"\n", b".")),
    st.binary(max_size=12).map(lambda text: text.replace(b"\r", b".").replace(b"\n", b".")),
)
STREAMS = st.tuples(st.sampled_from([b"", b"\xef\xbb\xbf"]), st.lists(st.tuples(LINES, ENDS), max_size=12)).map(
    lambda parts: parts[0] + b"".join(line + end for line, end in parts[1])
)


@given(stream=STREAMS, cuts=st.lists(st.integers(0, 200)))
def test_chunking_never_changes_the_events(stream: bytes, cuts: list[int]) -> None:
    events, last = decode(stream, cuts)
    assert events == reference(stream)
    assert (events, last) == decode(stream)


@given(stream=STREAMS)
def test_one_byte_at_a_time_gives_the_same_events(stream: bytes) -> None:
    assert decode(stream, list(range(len(stream)))) == decode(stream)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_all_line_ends_are_understood(end: bytes) -> None:
    stream = end.join([b"data: a", b"data: b", b"", b"data: c", b"", b""])
    assert decode(stream)[0] == [b"a\nb", b"c"]


def test_a_carriage_return_ends_its_line_without_waiting_for_a_line_feed() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: a\r\r") == [b"a"]
    assert decoder.feed(b"\ndata: b\r") == []  # the line feed belongs to the carriage return before it
    assert decoder.feed(b"\n") == []
    assert decoder.feed(b"\r\n") == [b"b"]


def test_a_byte_order_mark_is_dropped_even_in_pieces() -> None:
    decoder = SSEDecoder()
    assert [decoder.feed(piece) for piece in (b"\xef", b"\xbb", b"\xbfdata: a\n", b"\n")] == [[], [], [], [b"a"]]


def test_a_byte_order_mark_later_on_is_part_of_the_field_name() -> None:
    assert decode(b"data: a\n\n\xef\xbb\xbfdata: b\n\n")[0] == [b"a"]


def test_comments_and_other_fields_make_no_event() -> None:
    assert decode(b": OPENROUTER PROCESSING\n\nevent: ping\nid: 4\nretry: 10\n\ndata: x\n\n")[0] == [b"x"]


def test_only_one_space_after_the_colon_is_dropped() -> None:
    assert decode(b"data:x\n\ndata:  y\n\n")[0] == [b"x", b" y"]


def test_close_hands_out_an_event_without_its_blank_line() -> None:
    assert decode(b"data: a\n\ndata: [DONE]") == ([b"a"], [b"[DONE]"])
    assert decode(b"data: a\n\ndata: b\n") == ([b"a"], [b"b"])
    assert decode(b"data: a\n\n: bye") == ([b"a"], [])


def test_an_event_beyond_the_limit_is_an_error_however_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 64)
    for stream in (b"data: " + b"x" * 100, b"data: xxxxxxxxxx\n" * 9, b"data\n" * 100, b":" + b"x" * 100):
        decoder = SSEDecoder()
        with pytest.raises(TransportError, match="64 bytes"):
            decoder.feed(stream)
    many = SSEDecoder()
    assert len(many.feed(b"data: xxxxxxxxxx\n\n" * 1000)) == 1000  # the limit is for one event, not for the stream


def test_a_long_event_in_single_bytes_takes_linear_time() -> None:
    def seconds(size: int) -> float:
        decoder, start = SSEDecoder(), time.process_time()
        for _ in range(size):
            decoder.feed(b"x")
        return time.process_time() - start

    small = min(seconds(10_000) for _ in range(3))
    assert seconds(80_000) < 8 * small * 4  # quadratic would be 64 times
