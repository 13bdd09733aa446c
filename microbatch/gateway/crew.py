"""The worker processes of which a gateway may be one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from microbatch.gateway.report import Report


class Crew:
    """The workers that serve the same clients, as one of them knows them.

    Args:
        wanted: How many there should be.
        others: Returns what all others have counted, those included that have ended.

    Attributes:
        up: How many there are that serve.
        wanted: As given.
        others: As given.
    """

    def __init__(self, wanted: int, others: Callable[[], Awaitable[Sequence[Report]]]) -> None:
        self.wanted = wanted
        self.up: int = 0
        self.others = others


class Lifecycle:
    """The stage of its life that a gateway has reached.

    Attributes:
        crew: The workers of which it is one; None if it is alone.
        retiring: Whether each connection ends with the next answer on it.
        draining: Whether it is closing and takes no further requests of the API.
    """

    def __init__(self) -> None:
        self.crew: Crew | None = None
        self.retiring: bool = False
        self.draining: bool = False

    @property
    def leaving(self) -> bool:
        """True if connections are not kept."""
        return self.retiring or self.draining
