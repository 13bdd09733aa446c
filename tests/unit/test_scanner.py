"""Where a JSON object ends, in whatever pieces it comes, and where it stops being JSON."""

from __future__ import annotations

import json
import re
from itertools import pairwise

from helpers import each
from hypothesis import given
from hypothesis import strategies as st

from microbatch.prompt import demultiplexer
from microbatch.prompt.scanner import BROKEN, MAX_DEPTH, MORE, SCALAR, STRING, ObjectScanner

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)
OBJECTS = st.builds(
    json.dumps,
    st.dictionaries(st.text(max_size=6), VALUES, max_size=4),
    ensure_ascii=st.booleans(),
    indent=st.sampled_from([None, 1, "\t", "\r\n"]),
)
# Characters that decide something, with a few that decide nothing.
CRUMBS = st.sampled_from([*'{}[]":,\\/-+.eEu019 \t\n\r', "true", "nul", "\\u12", "\\ud800", "\x00", "\x1f", "é", "a"])


def refuse(word):
    raise ValueError(word)  # Python reads NaN and Infinity, which JSON does not have


DECODER = json.JSONDecoder(parse_constant=refuse)


def scan(text):
    return ObjectScanner().feed(text)


def scan_pieces(text, cuts):
    """Return what a scanner says that gets *text* in pieces, in the terms of the whole."""
    scanner = ObjectScanner()
    end = MORE
    for start, stop in pairwise(sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})):
        end = scanner.feed(text[start:stop])
        if end != MORE:
            return end if end == BROKEN else start + end
    return end


def python_end(text):
    try:
        return DECODER.raw_decode(text)[1]
    except (ValueError, RecursionError):
        return None


@given(text=OBJECTS, rest=st.text(max_size=5))
def test_a_sound_object_ends_where_json_says_it_does(text, rest):
    assert scan(text + rest) == len(text) == python_end(text + rest)


@given(text=OBJECTS, cuts=st.lists(st.integers(0, 200), max_size=10))
def test_the_pieces_never_change_where_a_sound_object_ends(text, cuts):
    assert scan_pieces(text, cuts) == len(text)


@given(text=OBJECTS, data=st.data())
def test_an_object_that_goes_on_is_neither_ended_nor_broken(text, data):
    assert scan(text[: data.draw(st.integers(0, len(text) - 1))]) == MORE


@given(text=OBJECTS, at=st.integers(0, 200), cut=st.integers(0, 4), crumb=CRUMBS)
def test_a_mutated_object_ends_only_where_json_agrees(text, at, cut, crumb):
    at = 1 + at % len(text)
    mutated = text[:at] + crumb + text[at + cut :]
    end = scan(mutated)
    assert python_end(mutated) == (end if end >= 0 else None)


@given(crumbs=st.lists(CRUMBS, max_size=25), cuts=st.lists(st.integers(0, 60), max_size=10))
def test_any_text_is_judged_alike_whole_and_in_pieces_and_as_json_does(crumbs, cuts):
    text = "{" + "".join(crumbs)
    end = scan(text)
    assert scan_pieces(text, cuts) == end
    assert scan_pieces(text, range(len(text))) == end
    assert python_end(text) == (end if end >= 0 else None)


@given(crumbs=st.lists(CRUMBS, max_size=25))
def test_what_is_called_broken_is_broken_whatever_may_follow(crumbs):
    text = "{" + "".join(crumbs)
    if scan(text) == BROKEN:
        for tail in ("}", '"}', "]}", "0}", '"":0}', '":0}', "0000}", 'n"}'):
            assert python_end(text + tail) is None


@each(
    "text",
    [
        '{"a"}',
        '{"a":}',
        '{"a":1,}',
        "{,}",
        '{"a":1 "b":2}',
        '{"a" 1}',
        '{"a":1]',
        '{"a":[1,]}',
        '{"a":[1}',
        "{1:2}",
        '{"a":01}',
        '{"a":1.}',
        '{"a":.5}',
        '{"a":+1}',
        '{"a":1e}',
        '{"a":truex}',
        '{"a":NaN}',
        '{"a":-Infinity}',
        '{"a":"\n"}',
        '{"a":"\x1f"}',
        '{"a":"\\q"}',
        '{"a":"\\u12g4"}',
        "{'a':1}",
    ],
)
def test_what_is_no_json_is_broken_before_its_end(text):
    assert scan(text) == BROKEN
    assert scan_pieces(text, range(len(text))) == BROKEN


def test_nesting_is_bounded():
    deepest = '{"a":' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}"
    assert scan(deepest) == len(deepest)
    assert scan(deepest.replace("[]", "[[]]")) == BROKEN


def test_a_number_of_more_than_a_thousand_digits_is_broken_in_any_pieces():
    for digits in (999, 1_000, 1_001, 5_000):
        text = '{"a":' + "7" * digits + "}"
        end = len(text) if digits <= 1_000 else BROKEN
        assert scan(text) == end
        assert scan_pieces(text, range(0, len(text), 40)) == end
        assert bool(re.fullmatch(SCALAR, "7" * digits)) == (end > 0)


@given(text=OBJECTS, cuts=st.lists(st.integers(0, 200), max_size=5), data=st.data())
def test_it_knows_where_the_unclosed_objects_and_arrays_began(text, cuts, data):
    text = text[: data.draw(st.integers(1, len(text) - 1))]
    scanner = ObjectScanner()
    for start, stop in pairwise(sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})):
        assert scanner.feed(text[start:stop]) == MORE
    bare = re.sub(r'"(?:[^"\\]|\\.)*(?:"|\\?$)', lambda found: "s" * len(found[0]), text)
    unclosed = []
    for place, char in enumerate(bare):
        if char in "{[":
            unclosed.append(place)
        elif char in "}]":
            unclosed.pop()
    assert scanner.opened == unclosed


# The expression that matches most elements in one go, and the scanner, must accept the same.


@given(crumbs=st.lists(CRUMBS, max_size=8), quoted=st.booleans())
def test_the_expression_for_elements_accepts_only_what_the_scanner_does(crumbs, quoted):
    answer = "".join(crumbs)
    answer = f'"{answer}"' if quoted else answer
    element = f'{{"id":"1kfqzt","answer":{answer}}}'
    found = demultiplexer._element(element)
    if found is not None:
        assert scan(element) == found.end()
        assert python_end(element) == found.end()


@given(
    answer=st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers() | st.none(), max_size=4),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
def test_the_expression_for_elements_takes_every_flat_answer(answer, ascii_only, indent):
    element = json.dumps({"id": "1kfqzt", "answer": answer}, ensure_ascii=ascii_only, indent=indent)
    found = demultiplexer._element(element)
    assert found is not None
    assert found.end() == scan(element) == len(element)
    assert json.loads(found.group(3)) == answer


@given(text=st.text())
def test_the_expression_for_strings_takes_every_json_string(text):
    for ascii_only in (True, False):
        assert re.fullmatch(STRING, json.dumps(text, ensure_ascii=ascii_only))
