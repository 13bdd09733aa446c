"""The vectors of texts, from a function or from the batcher's own endpoint."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from microbatch.semantic.vectors import read_vectors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from microbatch.batching.ticket import Ticket
    from microbatch.semantic.vectors import Floats

    Embed = Callable[[Sequence[Ticket], Sequence[str], float], Awaitable[list[Floats | None]]]
    """Returns the vectors of texts, those of tickets, within a number of seconds; None for one that cannot be used."""


def by_function(embed: Callable[[list[str]], Awaitable[Sequence[Any]]]) -> Embed:
    """Return what embeds texts with a user's function."""

    async def run(_tickets: Sequence[Ticket], texts: Sequence[str], seconds: float) -> list[Floats | None]:
        distinct = list(dict.fromkeys(texts))
        async with asyncio.timeout(seconds):
            vectors = read_vectors(await embed(list(distinct)), len(distinct))
        found = dict(zip(distinct, vectors, strict=True))
        return [found[text] for text in texts]

    return run
