"""A simulated reply, the faults that are error responses, and the prefix cache."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microbatch.lru import LRU
from microbatch.testing.counting import Pieces, compact, content_text, encode
from microbatch.testing.reading import EndpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from microbatch.messages import Limits, Usage
    from microbatch.testing.faults import Element, Fault

Ending = Literal["done", "cut", "reset", "stall", "hang"]


class SimulatedReply(msgspec.Struct):
    """A reply and its timing.

    Attributes:
        pieces: The text in pieces; only what comes before the line breaks, if it does.
        times: When each piece is due, in seconds after the request's arrival.
        finish_reason: Why the model stopped; None if it never says.
        usage: What is reported and paid.
        ending: "done", or how the line fails: the stream just ends ("cut"), the connection breaks ("reset"), nothing
            more comes ("stall"), or nothing comes at all ("hang").
        refusal: Whether the text is a refusal.
        limits: What is left of the quota, or None if there is none.
        thinking: Seconds from the request's arrival until the model has thought, if it writes nothing then.
    """

    pieces: Pieces
    times: list[float]
    finish_reason: str | None
    usage: Usage
    ending: Ending = "done"
    refusal: bool = False
    limits: Limits | None = None
    thinking: float = 0.0

    @property
    def duration(self) -> float:
        """Seconds from the request's arrival until the reply is whole."""
        return self.times[-1] if self.times else self.thinking


def error_of(fault: Fault, retry_after: float | None) -> EndpointError | None:
    """Return the error response that *fault* is, or None if it is none."""
    match fault.kind:
        case "http_400":
            return EndpointError(
                400, "Invalid prompt: the request could not be processed.", param="messages", code="invalid_value"
            )
        case "http_429":
            message = "Rate limit reached for requests. Please slow down."
            return EndpointError(429, message, kind="requests", code="rate_limit_exceeded", retry_after=retry_after)
        case "http_500":
            return EndpointError(
                500, "The server had an error while processing your request. Sorry!", kind="server_error"
            )
        case "filtered" if fault.random.random() < 0.5:  # noqa: PLR2004 - a coin
            return EndpointError(400, "The response was filtered.", param="prompt", code="content_filter")
        case _:
            return None


def results(elements: Iterable[Element], fault: Fault | None, indent: int | None) -> tuple[str, list[int]]:
    """Return a combined reply, and where each element ends in it."""
    texts = [compact({"id": name, "answer": answer}, indent) for name, answer in elements]
    if fault is not None and fault.kind == "broken_json":
        at = fault.random.randrange(len(texts))
        texts[at] = fault.broken(texts[at])
    ends = []
    position = len('{"results":[')
    for text in texts:
        ends.append(position + len(text))
        position = ends[-1] + 1
    return '{"results":[' + ",".join(texts) + "]}", ends


class Prefixes:
    """Digests of the last 10,000 prompt prefixes."""

    LEAST = 1_024
    STEP = 128
    MOST = 10_000

    def __init__(self) -> None:
        self._known: LRU[bytes, bool] = LRU(self.MOST)

    def seen(self, messages: Iterable[Mapping[str, Any]]) -> int:
        """Return how many tokens of the prompt's start were seen before, and remember it."""
        tokens = [
            token for each in messages for token in encode(f"{each.get('role')}\n{content_text(each.get('content'))}\n")
        ]
        cached = 0
        digest = blake2b(digest_size=16)
        for end in range(self.STEP, len(tokens) + 1, self.STEP):
            digest.update(repr(tokens[end - self.STEP : end]).encode())
            key = digest.digest()
            if key in self._known and end >= self.LEAST:
                cached = end
            self._known.put(key, True)
        return cached
