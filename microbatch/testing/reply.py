"""A simulated reply, and the prefix cache of the endpoint."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from microbatch.lru import LRU
from microbatch.testing.counting import Pieces, content_text, encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from microbatch.messages import Limits, Usage

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
        tool: The function whose arguments the text is; None for content.
        service_tier: The tier that is reported; None if the request names none.
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
    tool: str | None = None
    service_tier: str | None = None

    @property
    def duration(self) -> float:
        """Seconds from the request's arrival until the reply is whole."""
        return self.times[-1] if self.times else self.thinking


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
