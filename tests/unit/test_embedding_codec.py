"""Which vectors of a reply are taken for which texts."""

import struct
from array import array

import pytest
from helpers import each
from hypothesis import example, given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.embedding import codec
from microbatch.embedding.vectors import is_finite, vector_bytes, vector_of

INF, NAN = float("inf"), float("nan")


def vector(*numbers):
    return array("f", numbers)


def reply(*pairs):
    return mb.Embedded(vectors=pairs)


def read(pairs, asked=None, length=None):
    return codec.read(reply(*pairs), len(pairs) if asked is None else asked, length)


SOUND = [(index, vector(index, 1.0)) for index in range(4)]


@given(order=st.permutations(SOUND))
def test_vectors_are_matched_by_index_in_whatever_order_they_come(order):
    found = read(order)
    assert found.found == [each for _, each in SOUND]
    assert found.fault is None
    assert found.length == 2


indices = st.lists(st.one_of(st.integers(-2, 5), st.none(), st.booleans(), st.just("1"), st.just(1.0)), max_size=6)


@given(given=indices, asked=st.integers(2, 6))
@example(given=[True, False], asked=2)
@example(given=[0.0, 1.0], asked=2)
def test_unless_each_text_has_its_own_index_no_vector_is_taken(given, asked):
    found = read([(index, vector(1.0)) for index in given], asked)
    right = all(type(index) is int for index in given) and sorted(given) == list(range(asked))
    assert (found.fault is None) == right
    assert found.sound == right
    assert len(found.found) == asked


@each(
    "pairs",
    [
        SOUND[:3],  # one is missing
        [*SOUND[:2], (2, vector(3, 1))],  # one was skipped, and those after it have moved up
        [*SOUND, (4, vector(4, 1))],
        [*SOUND, SOUND[3]],
        [],
    ],
)
def test_a_reply_with_too_few_or_too_many_vectors_gives_none(pairs):
    assert not read(pairs, asked=4).sound


@each("index", [0, 1, 7, None, "0", True])
def test_a_list_of_one_needs_no_index(index):
    found = read([(index, vector(1, 2))])
    assert found.found == [vector(1, 2)]
    assert found.fault is None


def test_two_vectors_for_one_text_are_none():
    assert not read([(0, vector(1)), (1, vector(2))], asked=1).sound


@each("vectors", [None, 7, [1, 2], [(0, vector(1), 2), (1, vector(1), 2)]])
def test_a_reply_of_another_shape_is_a_fault_and_no_error(vectors):
    assert not codec.read(mb.Embedded(vectors=vectors), 2, None).sound


def test_a_completion_without_vectors_is_a_fault():
    assert not codec.read(mb.Completion("stop"), 2, None).sound


@each(
    "bad", [None, vector(NAN, 1), vector(1, INF), vector(-INF, INF), vector(), "12", ["a"], [None], {}, object(), 3.0]
)
def test_a_vector_that_cannot_be_used_does_no_harm_to_the_others(bad):
    found = read([(0, vector(1, 2)), (1, bad), (2, vector(3, 4))])
    assert found.found == [vector(1, 2), None, vector(3, 4)]
    assert found.fault is not None
    assert not found.odd


def test_of_vectors_that_differ_in_length_those_of_the_known_length_are_taken():
    pairs = [(0, vector(1, 2)), (1, vector(1)), (2, vector(1, 2, 3))]
    found = read(pairs, length=2)
    assert found.found == [vector(1, 2), None, None]
    assert found.odd
    assert found.length == 2


def test_of_vectors_that_differ_in_length_none_is_taken_if_no_length_is_known():
    found = read([(0, vector(1, 2)), (1, vector(1))])
    assert not found.sound
    assert found.length is None


def test_a_vector_is_a_copy_that_nothing_else_holds():
    theirs = vector(1, 2)
    (mine, other) = read([(0, theirs), (1, theirs)]).found
    mine[0] = other[1] = 9.0
    assert (theirs, mine, other) == (vector(1, 2), vector(9, 2), vector(1, 9))


floats = st.floats(width=32)


@given(numbers=st.lists(floats, min_size=1))
def test_numbers_that_are_not_finite_are_found_among_any_others(numbers):
    made = array("f", numbers)
    assert is_finite(made) == all(abs(number) != INF and number == number for number in made)  # noqa: PLR0124 NaN


@given(numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_a_vector_is_stored_as_little_endian_floats(numbers):
    data = vector_bytes(array("f", numbers))
    assert data == struct.pack(f"<{len(numbers)}f", *numbers)
    assert vector_of(data) == array("f", numbers)


@each("data", [b"", b"123", b"\x00\x00\xc0\x7f"])
def test_bytes_that_are_no_vector_raise(data):
    with pytest.raises(ValueError, match="vector"):
        vector_of(data)
