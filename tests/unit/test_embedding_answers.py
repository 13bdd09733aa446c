"""Vectors in the JSON of the gateway's answers."""

from __future__ import annotations

import base64
import json
import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.gateway.vectors import AT_ONCE, encode_list, encode_pieces, is_small
from microbatch.messages import Embedding, Reply, Usage
from microbatch.openai.embedding import (
    MAX_INPUTS,
    EmbeddingRequest,
    as_base64,
    read_embedding_request,
    reply_of,
    usage_of,
)

FIELDS = {"model": "m", "usage": {"prompt_tokens": 3, "total_tokens": 3}}
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def vectors_in(body, encoding):
    members = json.loads(body)
    assert [element["index"] for element in members["data"]] == list(range(len(members["data"])))
    assert {element["object"] for element in members["data"]} <= {"embedding"}
    assert members["object"] == "list"
    assert {name: members[name] for name in FIELDS} == FIELDS
    found = [element["embedding"] for element in members["data"]]
    if encoding == "base64":
        return [array("f", struct.unpack(f"<{len(raw) // 4}f", raw)) for raw in map(base64.b64decode, found)]
    return [array("f", numbers) for numbers in found]


@given(
    st.lists(st.lists(FLOATS, min_size=1, max_size=20).map(lambda numbers: array("f", numbers)), min_size=1, max_size=4)
)
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_an_answer_holds_the_same_32_bit_floats(encoding, vectors):
    assert vectors_in(encode_list(vectors, encoding, FIELDS), encoding) == vectors


def test_what_is_no_number_is_null():
    body = encode_list([array("f", [float("nan"), 1.0, float("inf")])], "float", FIELDS)
    assert json.loads(body)["data"][0]["embedding"] == [None, 1.0, None]


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_a_long_answer_comes_in_pieces_that_are_the_same_together(encoding):
    vectors = [array("f", [place / 7 + at for at in range(1_000)]) for place in range(200)]
    assert not is_small(vectors)
    pieces = [piece async for piece in encode_pieces(vectors, encoding, FIELDS)]
    assert b"".join(pieces) == encode_list(vectors, encoding, FIELDS)
    assert max(map(len, pieces)) < len(b"".join(pieces)) / 2


async def test_a_vector_longer_than_a_piece_is_one():
    vectors = [array("f", [0.5] * 10 * AT_ONCE)] * 2
    pieces = [piece async for piece in encode_pieces(vectors, "base64", FIELDS)]
    assert len(pieces) == 4
    assert vectors_in(b"".join(pieces), "base64") == vectors


def test_base64_leaves_the_vector_as_it_is():
    vector = array("f", [0.5, -1.0])
    assert base64.b64decode(as_base64(vector)) == struct.pack("<2f", 0.5, -1.0)
    assert vector == array("f", [0.5, -1.0])


# --- requests


def test_a_request_becomes_texts_and_arguments():
    body = {"model": "m", "input": "a", "dimensions": 3, "encoding_format": "base64", "user": "u"}
    read = read_embedding_request(body)
    assert isinstance(read, EmbeddingRequest)
    assert (read.texts, read.encoding) == (["a"], "base64")
    assert read.arguments == {"model": "m", "dimensions": 3, "params": {"user": "u"}}
    assert repr(read) == "EmbeddingRequest(texts=<1>)"
    plain = read_embedding_request({"input": ["a"] * MAX_INPUTS})
    assert isinstance(plain, EmbeddingRequest)
    assert plain.arguments == {"model": None, "dimensions": None, "params": None}


def test_all_fields_that_keep_a_request_alone_are_told():
    found = read_embedding_request({"input": [1], "model": "m", "dimensions": -1, "task": "x", "\n": 1, "\t": 2})
    assert found == ("input", "dimensions", "task", "another field")


# --- what the vectors of a request cost together


def embedding(route="batch", tokens=1, *, cost=0.5, request_id="r", **more):
    usage = Usage(prompt_tokens=tokens, estimated=more.pop("estimated", False))
    return Embedding(array("f", [1.0]), usage=usage, cost_usd=cost, route=route, request_id=request_id, **more)


@pytest.mark.parametrize(
    ("routes", "route"),
    [
        (["cache", "cache"], "cache"),
        (["cache", "shared"], "shared"),
        (["cache", "single", "shared"], "single"),
        (["batch", "single"], "batch"),
        (["batch", "fallback"], "fallback"),
    ],
)
def test_the_way_of_a_request_is_that_of_its_dearest_text(routes, route):
    assert reply_of([embedding(each) for each in routes]).route == route


async def test_shares_and_prices_add_up():
    several = [
        embedding(tokens=3, batch_size=9, waited=0.25, model=None),
        embedding("cache", 0, cost=0.0, request_id=None, batch_size=2, model="m"),
    ]
    reply: Reply[list[Embedding]] = reply_of(several)
    assert (reply.usage, reply.cost_usd, reply.batch_size) == (Usage(3), 0.5, 9)
    assert (reply.waited, reply.model, reply.request_id, reply.output) == (0.25, "m", None, several)
    assert usage_of(reply) == {"prompt_tokens": 3, "total_tokens": 3}
    assert await reply.settled() is reply
    assert reply_of([embedding(), embedding(cost=None)]).cost_usd is None
    assert reply_of([embedding(), embedding()]).request_id == "r"
    assert usage_of(reply_of([embedding(estimated=True)]))["microbatch_estimated"] is True
