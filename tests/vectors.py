"""A transport whose vectors are a function of the text, and whose replies tests can spoil."""

from __future__ import annotations

import asyncio
import hashlib
from array import array

import msgspec

import microbatch as mb

LENGTH = 4


def vector_of(text, length=LENGTH):
    """Return the only right vector of *text*."""
    digest = hashlib.shake_128(text.encode()).digest(length)
    return array("f", [byte / 256 for byte in digest])


def tokens_of(text):
    """Return the tokens that are reported for *text*: its bytes."""
    return len(text.encode())


class VectorTransport:
    """Answers embeddings calls.

    Args:
        spoil: Takes the number of the call, from 0, its inputs, and the sound pairs of index and vector; returns other pairs or raises.
        most: Most inputs of a call; a longer list is refused.
        refused: Texts for which a call is refused.
        delay: Seconds before a reply.
        usage: Whether it reports usage.
        scale: The part of its bytes that it reports as tokens.

    Attributes:
        calls: The calls received, in order.
    """

    model = None
    base_url = "https://vectors.test/v1"
    embedding_model = "embedder"

    def __init__(self, spoil=None, *, most=None, refused=(), delay=0.0, usage=True, length=LENGTH, scale=1.0):
        self.calls: list[mb.EmbeddingCall] = []
        self.answered = 0
        self._spoil = spoil
        self._most = most
        self._refused = set(refused)
        self._delay = delay
        self._usage = usage
        self._scale = scale
        self._length = length
        self.tokens = 0

    @property
    def sizes(self):
        """The number of inputs of each call."""
        return [len(call.inputs) for call in self.calls]

    async def send(self, call, on_text):
        raise AssertionError("nothing is asked here")

    async def embed(self, call):
        number = len(self.calls)
        self.calls.append(msgspec.structs.replace(call, inputs=[*call.inputs]))
        await asyncio.sleep(self._delay)
        if self._most is not None and len(call.inputs) > self._most:
            raise mb.BadRequest(f"at most {self._most} inputs", status=422)
        if self._refused.intersection(call.inputs):
            raise mb.BadRequest("an input is too long", status=400)
        length = call.dimensions or self._length
        pairs = [(index, vector_of(text, length)) for index, text in enumerate(call.inputs)]
        if self._spoil is not None:
            pairs = self._spoil(number, call.inputs, pairs)
        self.answered += 1
        tokens = int(sum(map(tokens_of, call.inputs)) * self._scale)
        self.tokens += tokens if self._usage else 0
        return mb.Embedded(
            vectors=pairs,
            usage=mb.Usage(tokens) if self._usage else None,
            model=f"{call.model}-1",
            request_id=f"r{number}",
        )

    async def aclose(self):
        pass


def is_right(embedding, text, length=LENGTH):
    """Return whether *embedding* holds the vector of *text*."""
    return embedding.vector == vector_of(text, length)
