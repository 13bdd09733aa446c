"""Latency of the simulated model: the instant at which each piece of a reply is due."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated

from microbatch.checking import AtLeast, Seconds, check_fields

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from microbatch.testing.counting import Pieces


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Speed of the model. For every duration and rate, None and 0 mean no delay.

    Args:
        first_token: Seconds from the request's arrival to the first token.
        tokens_per_second: Rate of the tokens after that.
        element: Seconds for each element of a combined reply, in place of the token rate: element k, from 1, arrives whole
            at `first_token` + k x `element`. A single reply is one element.

    Raises:
        ConfigError: A number is negative.
    """

    first_token: Seconds | None = 0.5
    tokens_per_second: Annotated[float, AtLeast(0)] | None = 80.0
    element: Seconds | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def thinking(self, hidden: int) -> float:
        """Return the seconds from a request's arrival until a model has thought *hidden* tokens; 0 if it does not think."""
        if not hidden:
            return 0.0
        return (self.first_token or 0.0) + (hidden / self.tokens_per_second if self.tokens_per_second else 0.0)

    def times(self, pieces: Pieces, element_ends: Sequence[int], hidden: int = 0) -> list[float]:
        """Return the instant each piece is due, in seconds after the request's arrival.

        *element_ends* says where in the text each element ends; what follows the last one comes with it. *hidden* are the tokens that
        the model thinks before.
        """
        first = self.thinking(hidden) or self.first_token or 0.0
        if self.element:
            starts = accumulate(map(len, pieces.texts), initial=0)
            last = max(0, len(element_ends) - 1)
            # A token may hold the end of one element and the start of the next; it is due when the former is.
            ended = [min(bisect_right(element_ends, start), last) for start in starts]
            return [first + (count + 1) * self.element for count in ended[: len(pieces.texts)]]
        if not self.tokens_per_second:
            return [first] * len(pieces.texts)
        before = [0, *pieces.ends]
        return [first + count / self.tokens_per_second for count in before[: len(pieces.texts)]]


async def paced(times: Sequence[float], start: float) -> AsyncIterator[tuple[int, int]]:
    """Yield ranges of pieces as they fall due at *times*, ascending, in seconds after the loop time *start*; sleep in between.

    A late consumer receives everything that is due in one range, so that rates beyond the clock's resolution are kept.
    """
    loop = asyncio.get_running_loop()
    sent = 0
    while sent < len(times):
        await sleep_until(start + times[sent])
        # Not less than one: the clock's rounding may wake us a hair early.
        due = bisect_right(times, loop.time() - start, lo=sent + 1)
        yield sent, due
        sent = due


async def sleep_until(when: float) -> None:
    """Sleep until `loop.time()` is *when*; return at once if that has passed."""
    delay = when - asyncio.get_running_loop().time()
    if delay > 0:
        await asyncio.sleep(delay)
