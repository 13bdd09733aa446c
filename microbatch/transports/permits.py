"""Common parts of the limiters of requests and tokens: a minute, the burst, the counts of endpoints, and how accounts use a limiter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.messages import Limits, Usage

MINUTE: Final = 60.0
LATENESS: Final = 1.0
WINDOW: Final = MINUTE + LATENESS
"""Requests sent a minute apart can arrive a little less apart, so a minute is taken to be longer than it is."""

# A smaller burst wastes less of the steady rate: limit = burst + rate x window.
_BURST_SHARE: Final = 0.02
# One request may be more than that of a low limit; then the burst is one request, up to this share.
_MAX_BURST_SHARE: Final = 0.05


def burst(limit: float, unit: float) -> float:
    """Return how much of *limit* may be used at once, where one request uses at least *unit*."""
    return max(_BURST_SHARE * limit, min(unit, _MAX_BURST_SHARE * limit))


class EndpointCount(NamedTuple):
    """The endpoint's count of the requests, or the tokens, of a minute.

    Attributes:
        limit: Its limit.
        used: The part of it that is used, less that of others by `RateLimit.share`; may be negative.
        seconds: Time for which the count holds.
    """

    limit: int
    used: float
    seconds: float


def endpoint_counts(limits: Limits, share: float) -> tuple[EndpointCount | None, EndpointCount | None]:
    """Return what the endpoint reports of requests and of tokens; None where it does not, or for the limit of a longer period."""
    return (
        _count(limits.limit_requests, limits.remaining_requests, limits.reset_requests, share),
        _count(limits.limit_tokens, limits.remaining_tokens, limits.reset_tokens, share),
    )


def _count(limit: int | None, remaining: int | None, reset: float | None, share: float) -> EndpointCount | None:
    if limit is None or remaining is None:
        return None
    if reset is not None and reset > MINUTE and remaining > 0:
        return None  # the limit of a longer period (requests per day) that is not used up
    return EndpointCount(
        limit, limit - remaining - (1 - share) * limit, MINUTE if reset is None else min(reset, MINUTE)
    )


class Limiter(Protocol):
    """The limits of one (endpoint, model, credentials), as an account uses them; grants are the limiter's own objects."""

    used: float  # for `SharedLRU`

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that one request can be granted; None for no limit."""

    @property
    def limits_requests(self) -> bool:
        """True if there is a limit on requests."""

    @property
    def trouble(self) -> str | None:
        """The reason for which requests wait although they are within the limits; None if nothing is wrong."""

    def wait(self, tokens: int, now: float, who: object = None) -> float:
        """Return the seconds until a request may be granted if nothing else is; if not 0.0, *who* has a claim until it is granted.

        It is infinite if that depends on something else; see `watch`.
        """

    def grant(self, tokens: int, now: float, who: object = None) -> Any:
        """Charge a request that need not wait, and return its grant."""

    def disclaim(self, who: object) -> None:
        """Drop the claim of *who*."""

    def cancel(self, grant: Any) -> None:
        """Take back *grant*, whose request was not sent."""

    def ended(
        self, grant: Any, usage: Usage | None, limits: Limits | None, now: float, *, reserved: bool = True
    ) -> None:
        """Learn from the end of a request, with *usage* and *limits* as the endpoint reports them.

        Unless *reserved*, no `max_tokens` was sent; then the charge for the answer was a guess, and is corrected.
        """

    def watch(self, changed: Callable[[], None]) -> None:
        """Have the method *changed* called, while its object exists, when asking again may succeed sooner than `wait` has said."""
