"""The reader of embeddings replies: every shape that servers send, and none in which a vector gets another one's index."""

from __future__ import annotations

import base64
import json
import math
import struct
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.messages import Usage
from microbatch.transports.embedding_reply import HEAD_BYTES, EmbeddingReader

Numbers = list[float]


def read(body: bytes | str | Any) -> EmbeddingReader:
    """Return a reader that has read *body*: bytes, text, or an object to be written as JSON."""
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    reader = EmbeddingReader(bytearray(raw))
    for _ in reader.read():
        pass
    return reader


def vectors(body: Any) -> list[tuple[int | None, Numbers | None]]:
    return [(index, None if vector is None else vector.tolist()) for index, vector in read(body).vectors]


def packed(numbers: Numbers) -> str:
    """Return *numbers* as OpenAI writes them for `encoding_format` base64."""
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def element(index: Any, embedding: Any, **more: Any) -> dict[str, Any]:
    return {"object": "embedding", "index": index, "embedding": embedding, **more}


@pytest.mark.parametrize("indent", [None, 1])
def test_numbers_and_base64_are_the_same_vector(indent: int | None) -> None:
    data = [element(1, [0.25, -3, 1e-3]), element(0, packed([0.25, -3, 1e-3]))]
    body = json.dumps({"object": "list", "data": data, "model": "m"}, indent=indent)
    first = [0.25, -3.0, array("f", [1e-3])[0]]
    assert vectors(body) == [(1, first), (0, first)]
    assert read(body).model == "m"
    assert read(body).in_base64


def test_vectors_are_32_bit_floats() -> None:
    (_, vector), *_ = read({"data": [element(0, [0.1])]}).vectors
    assert isinstance(vector, array)
    assert vector.typecode == "f"


@pytest.mark.parametrize(
    ("index", "found"),
    [
        (7, 7),
        ("7", 7),
        (7.0, 7),
        (-1, -1),
        (None, None),
        (True, None),
        (1.5, None),
        ("x", None),
        ("٣", None),
        ("", None),
        ([0], None),
        ({"i": 0}, None),
        (10**400, 10**400),
        ("9" * 5000, None),
    ],
)
def test_an_index_is_a_whole_number_in_any_notation_or_none(index: Any, found: int | None) -> None:
    assert vectors({"data": [element(index, [1.0]), element(1, [2.0])]}) == [(found, [1.0]), (1, [2.0])]


def test_an_index_may_be_absent() -> None:
    assert vectors({"data": [{"embedding": [1.0]}, {"embedding": packed([2.0])}]}) == [(None, [1.0]), (None, [2.0])]


UNREADABLE = [
    *("[]", '"" ', "null", "{}", "3", "true", '"%%%%"', '"AAA"', '"AAAAAAA="', f'"{packed([1.0, 2.0])[:-3]}"', '"é"'),
    *("[NaN, 1]", "[1, Infinity]", "[1, -Infinity]", "[1, null]", '[1, "2"]', "[1, 1e400]", "[1, 1e39]", "[1, true]"),
    *("[[1], [2]]", "[1, [2]]", f'"{packed([1.0, math.nan])}"', f'"{packed([math.inf])}"', "[" + "9" * 400 + "]"),
    *('"[1, 2]"', f'"\\n{packed([1.0])}"', f'"{packed([1.0])}\\n"', '{"float": [1]}'),
]


@pytest.mark.parametrize("written", UNREADABLE)
def test_a_vector_that_cannot_be_read_is_none_and_does_no_harm_to_the_others(written: str) -> None:
    one = '{"index": 1, "embedding": %s}'
    body = '{"data": [{"index": 0, "embedding": [1.5]}, %s, {"index": 2, "embedding": "%s"}], "usage": {"total_tokens": 9}}'
    reader = read(body % (one % written, packed([2.5])))
    assert [(index, vector and vector.tolist()) for index, vector in reader.vectors] == [
        (0, [1.5]),
        (1, None),
        (2, [2.5]),
    ]
    assert reader.usage == Usage(9)


def test_missing_padding_is_added() -> None:
    assert vectors({"data": [element(0, packed([1.0]).rstrip("="))]}) == [(0, [1.0])]


def test_null_in_place_of_an_element_is_a_vector_without_an_index() -> None:
    sound = element(2, [1.0])
    assert vectors({"data": [None, sound]}) == [(None, None), (2, [1.0])]
    assert vectors({"data": [sound, None]}) == [(2, [1.0]), (None, None)]
    assert vectors({"data": [sound, None, sound]}) == [(2, [1.0]), (None, None), (2, [1.0])]


def test_objects_and_braces_inside_an_element_do_not_end_it() -> None:
    odd = element(0, [1.0], meta={"a": {"b": "}]}"}, "c": [{}]}, text='},{]"}')
    assert vectors({"data": [odd, element(1, [2.0])]}) == [(0, [1.0]), (1, [2.0])]


def test_an_element_with_more_objects_than_are_looked_for_costs_the_reply_and_raises_nothing() -> None:
    odd = element(1, [1.0], meta=[{"a": 1}] * 40)
    assert vectors({"data": [element(0, [1.0]), odd]}) == []


def test_the_list_that_counts_is_the_one_at_the_top() -> None:
    inner = {"data": [element(0, [9.0])]}
    assert vectors({"meta": inner, "data": [element(0, [1.0])]}) == [(0, [1.0])]
    assert vectors({"data": [element(0, [1.0])], "meta": inner}) == [(0, [1.0])]
    assert vectors({"model": '"data": [{"index": 0}]', "data": [element(0, [1.0])]}) == [(0, [1.0])]
    assert vectors({"object": "data", "data": [element(0, [1.0])]}) == [(0, [1.0])]


def test_a_list_that_begins_late_is_found() -> None:
    assert vectors({"note": "x" * HEAD_BYTES, "data": [element(0, [1.0])]}) == [(0, [1.0])]


@pytest.mark.parametrize("before", ["", " \n", "\ufeff"])
def test_the_form_of_llama_cpp_below_an_address_without_v1(before: str) -> None:
    body = before + json.dumps([{"index": 1, "embedding": [[1.0, 2.0]]}, {"index": 0, "embedding": [[3.0, 4.0]]}])
    assert vectors(body) == [(1, [1.0, 2.0]), (0, [3.0, 4.0])]


def test_vectors_without_names() -> None:
    assert vectors({"embeddings": [[1.0], [2.0]], "model": "m"}) == [(None, [1.0]), (None, [2.0])]
    assert vectors([[1.0], [2.0]]) == [(None, [1.0]), (None, [2.0])]


@pytest.mark.parametrize(
    ("fields", "usage"),
    [
        ({"usage": {"prompt_tokens": 5, "total_tokens": 5}}, Usage(5)),
        ({"usage": {"total_tokens": 5}}, Usage(5)),
        ({"usage": {"prompt_tokens": 0, "total_tokens": 5}}, Usage(5)),
        ({"usage": {"prompt_tokens": "5"}}, Usage(5)),
        ({"usage": {"input_tokens": 5}}, Usage(5)),
        ({"usageMetadata": {"promptTokenCount": 5}}, Usage(5)),
        ({"meta": {"billed_units": {"input_tokens": 5}}}, Usage(5)),
        ({"usage": {"prompt_tokens": 0, "total_tokens": 0}}, None),
        ({"usage": {"prompt_tokens": math.nan}}, None),
        ({"usage": None}, None),
        ({"usage": [1]}, None),
        ({}, None),
    ],
)
def test_usage_under_each_name(fields: dict[str, Any], usage: Usage | None) -> None:
    assert read({**fields, "data": [element(0, [1.0])]}).usage == usage
    assert read({"data": [element(0, [1.0])], **fields}).usage == usage


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "no such thing", "code": 429}}, "no such thing"),
        ({"error": {"message": "no such thing"}, "data": []}, "no such thing"),
        ({"data": [], "error": "no such thing"}, "no such thing"),
        ({"error": {"message": "no such thing"}, "data": [element(0, None)]}, "no such thing"),
        ({"error": {"message": "no such thing"}, "data": [element(0, [1.0])]}, "no such thing"),
        ({"object": "error", "message": "no such thing", "code": 40303}, "no such thing"),
        ({"detail": "no such thing"}, "no such thing"),
        ([{"error": {"message": "no such thing", "status": "INVALID_ARGUMENT"}}], "no such thing"),
    ],
)
def test_an_error_in_place_of_vectors(body: Any, message: str) -> None:
    reader = read(body)
    assert reader.vectors == []
    assert reader.fault is not None
    assert reader.fault.message == message


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"null",
            b"3",
            b'"text"',
            b"{}",
            b"[]",
            b"[{}]",
            b"<html>",
            b"data: {}\n\n",
            b"\xff\xfe",
            b"[" * 100_000,
        ),
        *(
            b'{"data": []}',
            b'{"data": [{}]}',
            b'{"data": {}}',
            b'{"data": [1]}',
            b'{"data": [{"index": 0}]}',
            b'{"data":[{',
        ),
        *(b'{"data": [{"index": 0, "embedding": null}]}', b'{"data": [{"embedding": {}}]}', b'{"object": "list"}'),
    ],
)
def test_what_holds_no_vector_is_no_answer(body: bytes) -> None:
    reader = read(body)
    assert (reader.vectors, reader.fault) == ([], None)


def test_a_reply_that_was_cut_is_no_answer_wherever_it_was_cut() -> None:
    data = [element(0, [1.0, 2.0]), element(1, packed([3.0])), element(2, [4.0], x={"y": 1})]
    body = json.dumps({"object": "list", "data": data, "usage": {"total_tokens": 3}}).encode()
    assert len(read(body).vectors) == 3
    for end in range(len(body)):
        assert read(body[:end]).vectors == [], body[:end]


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
lists = st.lists(floats, min_size=1, max_size=4)
indices = st.one_of(st.integers(-2, 5), st.integers(0, 5).map(str), st.none())
extras = st.dictionaries(
    st.text(max_size=4).filter(lambda name: name not in ("index", "embedding")),
    st.recursive(
        st.text(max_size=6), lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=2), max_leaves=3
    ),
    max_size=2,
)
elements = st.tuples(indices, lists, st.booleans(), extras)


def written(parts: list[Any]) -> list[dict[str, Any]]:
    return [
        {**extra, "embedding": packed(numbers) if as_text else numbers, "index": index}
        for index, numbers, as_text, extra in parts
    ]


def read_index(index: Any) -> int | None:
    return int(index) if index is not None else None


@given(st.lists(elements, min_size=1, max_size=4), extras, st.sampled_from([None, 0, 1, "\t"]), st.booleans())
def test_each_vector_has_the_index_that_stands_beside_it(
    parts: list[Any], around: dict[str, Any], indent: int | str | None, ascii_only: bool
) -> None:
    around = {name: value for name, value in around.items() if name not in ("error", "object", "data")}
    body = json.dumps({**around, "data": written(parts), "model": "m"}, indent=indent, ensure_ascii=ascii_only)
    assert vectors(body.encode("utf-8", "surrogatepass")) == [
        (read_index(index), numbers) for index, numbers, *_ in parts
    ]


def plainly(body: bytes) -> list[tuple[int | None, Any]]:
    """Return the vectors of a reply as the standard library reads it; raise an error if it has none."""
    found = []
    for each in json.loads(body.decode("utf-8", "replace"), strict=False)["data"]:
        fields = each if isinstance(each, dict) else {"embedding": each}
        index, value = fields.get("index"), fields.get("embedding")
        if isinstance(value, str):
            try:
                raw = base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
                value = list(struct.unpack(f"<{len(raw) // 4}f", raw))
            except (ValueError, struct.error):
                value = None
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
            value = value[0]
        if isinstance(index, str | float):
            index = int(float(index)) if str(index).replace(".", "").isdigit() and float(index).is_integer() else None
        found.append((index, value))
    return found


@given(st.lists(elements, min_size=2, max_size=4), st.data())
def test_a_damaged_reply_has_no_vector_under_an_index_that_is_not_beside_it(
    parts: list[Any], data: st.DataObject
) -> None:
    body = bytearray(json.dumps({"data": written(parts), "usage": {"total_tokens": 2}}).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        match data.draw(st.sampled_from(["cut", "drop", "swap", "insert"])):
            case "cut":
                del body[at : at + data.draw(st.integers(1, 40))]
            case "drop":
                del body[at]
            case "swap":
                body[at] = data.draw(st.sampled_from(b'{}[],:"0123456789.e-null '))
            case _:
                body[at:at] = data.draw(
                    st.sampled_from([b"{", b"}", b"]", b"[", b",", b'"', b"}]", b"},{", b"NaN", b"1"])
                )
        if not body:
            return
    given_back = vectors(bytes(body))
    if given_back:
        expected = plainly(bytes(body))
        assert [index for index, _ in given_back] == [index for index, _ in expected]
        for (_, ours), (_, theirs) in zip(given_back, expected, strict=True):
            assert ours is None or ours == pytest.approx(theirs, rel=1e-6, abs=1e-38)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_without_an_exception(body: bytes) -> None:
    for index, vector in read(body).vectors:
        assert index is None or isinstance(index, int)
        assert vector is None or (isinstance(vector, array) and all(map(math.isfinite, vector)))


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_any_bytes_around_a_sound_element_are_read_without_an_exception(before: bytes, after: bytes) -> None:
    for index, vector in read(b'{"data": [{"index": 0, "embedding": ' + before + b"}, {" + after + b"}]}").vectors:
        assert index is None or isinstance(index, int)
        assert vector is None or all(map(math.isfinite, vector))
