"""The simulated embedding model: takes an embeddings request and returns the reply. No I/O."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from microbatch.accounting.tokens import load_encoding
from microbatch.checking import Count, check_fields
from microbatch.messages import Usage
from microbatch.testing.embedding_faults import Element, EmbeddingFault, EmbeddingFaults, spoil
from microbatch.testing.faults import http_error
from microbatch.testing.reading import EndpointError
from microbatch.testing.vectors import text_vector

if TYPE_CHECKING:
    import random
    from array import array
    from collections.abc import Collection, Mapping

    from microbatch.messages import Limits

ENCODING: Final = "cl100k_base"
"""The encoding of OpenAI's embedding models."""

_DIMENSIONS: Final = {
    "text-embedding-3-small": 1_536,
    "text-embedding-3-large": 3_072,
    "text-embedding-ada-002": 1_536,
}
_FIXED: Final = "ada-002"  # in the names of models that take no `dimensions`
_FORMATS: Final = ("float", "base64")

Encodings = Literal["ok", "400", "500", "ignored"]


class EmbeddingRequest(msgspec.Struct):
    """An embeddings request.

    Attributes:
        texts: The inputs; those that came as tokens are decoded.
        model: The model.
        tokens: Tokens of all inputs.
        dimensions: The length asked for, or None.
        base64: Whether vectors are asked for in base64.
    """

    texts: list[str]
    model: str
    tokens: int
    dimensions: int | None
    base64: bool


class EmbeddingReply(msgspec.Struct):
    """The reply to an embeddings request.

    Attributes:
        body: Its JSON.
        usage: What is reported and paid.
        ending: How it ends: whole, broken in the middle, or nothing ever comes.
        limits: What is left of the quota, or None if there is none.
    """

    body: bytes
    usage: Usage
    ending: Literal["done", "cut", "hang"] = "done"
    limits: Limits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedEmbeddings:
    """The embedding models of a `SimulatedModel`, with the limits and the words of OpenAI's.

    Vectors are those of `microbatch.testing.embedded`: texts that share words are near.

    Args:
        models: Names of the models; any other is refused. None serves any name.
        dimensions: Length of the vectors; None stands for that of OpenAI's model of the name, and 384 for other names. A request may
            ask for less, unless the model's name has "ada-002" in it.
        max_inputs: Most inputs of a request.
        max_input_tokens: Most tokens of an input.
        max_tokens: Most tokens of a request.
        encoding_format: "400" refuses the field of the name, "500" fails if it is "base64", and "ignored" sends numbers.
        reports_usage: Whether replies have a `usage`.
        poison: A request is refused with 400 if one of its texts contains this; None refuses none.
        faults: The selection of replies that go wrong; None for none.

    Raises:
        ConfigError: A word is unknown or a limit below its minimum.
    """

    models: Collection[str] | None = None
    dimensions: Count | None = None
    max_inputs: Count = 2_048
    max_input_tokens: Count = 8_192
    max_tokens: Count = 300_000
    encoding_format: Encodings = "ok"
    reports_usage: bool = True
    poison: str | None = None
    faults: EmbeddingFaults | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def vector(self, text: str, model: str, dimensions: int | None = None) -> array[float]:
        """Return the vector of *text*, of *dimensions* numbers if a request asks for so many."""
        return text_vector(text, model, self._length(model), dimensions)

    def _length(self, model: str) -> int:
        return self.dimensions or _DIMENSIONS.get(model, 384)

    def read(self, body: Mapping[str, Any]) -> EmbeddingRequest:
        """Check and understand a request.

        Raises:
            EndpointError: It is refused.
        """
        model = body.get("model")
        if not model or not isinstance(model, str):
            raise EndpointError(400, "you must provide a model parameter")
        if self.models is not None and model not in self.models:
            message = f"The model `{model}` does not exist or you do not have access to it."
            raise EndpointError(404, message, code="model_not_found")
        in_base64 = self._checked_format(body.get("encoding_format"))
        dimensions = self._checked_dimensions(body.get("dimensions"), model)
        texts, counts = _read_input(body, self.max_inputs)
        for place, count in enumerate(counts):
            if count > self.max_input_tokens:
                message = f"Invalid 'input[{place}]': maximum input length is {self.max_input_tokens} tokens."
                raise EndpointError(400, message)
        tokens = sum(counts)
        if tokens > self.max_tokens:
            message = f"Requested {tokens} tokens, max {self.max_tokens} tokens per request"
            raise EndpointError(400, message, kind="max_tokens_per_request", code="max_tokens_per_request")
        if self.poison is not None and any(self.poison in text for text in texts):
            raise _invalid_input()
        return EmbeddingRequest(texts, model, tokens, dimensions, in_base64)

    def error(self, kind: EmbeddingFault | None) -> EndpointError | None:
        """Return the error response that a fault is, or None if it is none."""
        if kind is None or self.faults is None:
            return None
        return http_error(kind, self.faults.retry_after, param="input")

    def reply(self, request: EmbeddingRequest, fault: tuple[EmbeddingFault, random.Random] | None) -> EmbeddingReply:
        """Return the reply to a request, with a fault that is no error response, or without one."""
        vectors = (self.vector(text, request.model, request.dimensions) for text in request.texts)
        elements = [Element(place, vector) for place, vector in enumerate(vectors)]
        kind = None if fault is None else fault[0]
        if fault is not None:
            elements = spoil(elements, *fault)
        in_base64 = request.base64 and kind != "floats" and self.encoding_format != "ignored"
        usage = Usage(request.tokens)
        body: dict[str, Any] = {
            "object": "list",
            "data": [_element_object(element, in_base64=in_base64) for element in elements],
            "model": request.model,
        }
        if self.reports_usage:
            body["usage"] = {"prompt_tokens": request.tokens, "total_tokens": request.tokens}
        # Servers in Python write NaN so.
        content = json.dumps(body).encode() if kind == "nan" else msgspec.json.encode(body)
        return EmbeddingReply(content, usage, kind if kind in ("cut", "hang") else "done")

    def _checked_format(self, form: Any) -> bool:
        """Return whether vectors are asked for in base64."""
        if form is None:
            return False
        if self.encoding_format == "400":
            message = "Unsupported parameter: 'encoding_format' is not supported with this model."
            raise EndpointError(400, message, param="encoding_format", code="unsupported_parameter")
        if form not in _FORMATS:
            message = f"Invalid value for 'encoding_format' = {form}. Supported values: ['float', 'base64']."
            raise EndpointError(400, message)
        if form == "base64" and self.encoding_format == "500":
            raise EndpointError(500, "Internal server error", kind="server_error")
        return bool(form == "base64")

    def _checked_dimensions(self, dimensions: Any, model: str) -> int | None:
        if dimensions is None:
            return None
        if _FIXED in model:
            raise EndpointError(400, "This model does not support specifying dimensions.")
        most = self._length(model)
        if not _is_whole(dimensions) or not 1 <= dimensions <= most:
            message = f"Invalid value for 'dimensions' = {dimensions}. Must be an integer from 1 to {most}."
            raise EndpointError(400, message, param="dimensions", code="invalid_value")
        return int(dimensions)


def embedded(text: str, model: str, dimensions: int | None = None) -> array[float]:
    """Return the vector that a simulated model has for *text*, of *dimensions* numbers if a request asks for so many.

    Each word, pair of neighbouring words and three-letter sequence of a word adds its weight to a few coordinates, which, like the
    signs, come from a hash: texts that share words are near, whatever they mean. `microbatch/testing/vectors.py` has the details. The
    vector has length 1, and is the same in every process and under every version of Python.
    """
    return SimulatedEmbeddings().vector(text, model, dimensions)


def _read_input(body: Mapping[str, Any], most: int) -> tuple[list[str], list[int]]:
    """Return the texts of a request's `input`, and the tokens of each.

    It is a string, a list of strings, a list of tokens, or a list of lists of tokens.
    """
    if "input" not in body:
        raise EndpointError(
            400, "Missing required parameter: 'input'.", param="input", code="missing_required_parameter"
        )
    given: Any = body["input"]
    inputs: list[Any] = given if isinstance(given, list) else [given]
    if given and inputs is given and all(map(_is_whole, inputs)):
        inputs = [inputs]
    if len(inputs) > most:
        message = (
            f"Invalid 'input': array too long. Expected an array with maximum length {most}, but instead got an array with length "
            f"{len(inputs)}."
        )
        raise EndpointError(400, message, param="input", code="array_above_max_length")
    if not inputs or not all(inputs) or len(set(map(type, inputs))) > 1:
        raise _invalid_input()
    encoding = load_encoding(ENCODING)
    if all(isinstance(each, str) for each in inputs):
        return inputs, [len(encoding.encode_ordinary(text)) for text in inputs]
    if not all(isinstance(each, list) and all(map(_is_whole, each)) for each in inputs):
        raise _invalid_input()
    try:
        return [encoding.decode(tokens) for tokens in inputs], [len(tokens) for tokens in inputs]
    except (KeyError, OverflowError):
        raise _invalid_input() from None


def _invalid_input() -> EndpointError:
    message = "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
    return EndpointError(400, message)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _element_object(element: Element, *, in_base64: bool) -> dict[str, Any]:
    written: dict[str, Any] = {"object": "embedding", "index": element.index, "embedding": None}
    if element.index is msgspec.UNSET:
        del written["index"]
    vector = element.vector
    if vector is None:
        return written
    if not in_base64:
        written["embedding"] = ["?", *vector[1:]] if element.damaged else vector.tolist()
        return written
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    raw = vector.tobytes()
    written["embedding"] = base64.b64encode(raw[:-1] if element.damaged else raw).decode()
    return written
