"""The rate limits of an endpoint, as the caller declares them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from microbatch.errors import ConfigError
from microbatch.lru import SharedLRU
from microbatch.policy import at_least, one_of, whole
from microbatch.transports.bucket import Bucket, Charge

if TYPE_CHECKING:
    from collections.abc import Hashable

_CAPACITY: Final = 1_024


class RateLimit:
    """Limits on requests and tokens per minute, for each endpoint, model and key.

    A request is charged when it is sent: 1 request, and the tokens of its prompt + `max_tokens`, as providers do; without
    `max_tokens`, the answer lengths learned so far. A combined call whose callers set none carries a bound of its own, which is
    charged likewise; prompt and bound are at most a quarter of `tpm`, unless the prompt alone takes nearly as much. Several
    batchers may share one object.

    Args:
        rpm: Requests per minute. None for no limit.
        tpm: Tokens per minute, prompt and answer together. None for no limit.
        share: The fraction of both that this process may use: 1/n for n processes with one key.
        charge: "reserved" keeps the charge for `max_tokens`, or for the bound, unless the endpoint's `x-ratelimit-remaining-*`
            headers show that it gave back the unused part; "used" gives it back as soon as the endpoint has reported its usage.
        adaptive: Whether the number of concurrent calls adapts as well: it grows by one with each round of successes, and halves
            when the endpoint is overloaded (429, 503, 529, timeouts).

    Raises:
        ConfigError: A setting is out of range, there is none, or not even one request a minute is left.
    """

    def __init__(
        self,
        *,
        rpm: int | None = None,
        tpm: int | None = None,
        share: float = 1.0,
        charge: Charge = "reserved",
        adaptive: bool = False,
    ) -> None:
        whole(1, rpm=rpm, tpm=tpm)
        at_least(0, share=share)
        one_of(Charge, charge=charge)
        if not 0 < share <= 1:
            raise ConfigError(f"share must be above 0 and at most 1, got {share!r}")
        if rpm is None and tpm is None and not adaptive:
            raise ConfigError("a RateLimit needs rpm=, tpm= or adaptive=True")
        if rpm is not None and rpm * share < 1:
            raise ConfigError(f"rpm={rpm} times share={share} leaves less than one request a minute")
        if tpm is not None and tpm * share < 1:
            raise ConfigError(f"tpm={tpm} times share={share} leaves less than one token a minute")
        self.rpm = rpm
        self.tpm = tpm
        self.share = share
        self.charge: Charge = charge
        self.adaptive = adaptive
        self._buckets: SharedLRU[Hashable, Bucket] = SharedLRU(_CAPACITY)

    def __repr__(self) -> str:
        """Return the settings."""
        settings = f"rpm={self.rpm}, tpm={self.tpm}, share={self.share:g}, charge={self.charge!r}"
        return f"RateLimit({settings}, adaptive={self.adaptive})"

    @property
    def max_tokens(self) -> int | None:
        """The most tokens that one request can be granted; None for no limit."""
        return None if self.tpm is None else int(self.tpm * self.share)

    def bucket(self, key: Hashable, now: float) -> Bucket:
        """Return the bucket of one (endpoint, model, credentials)."""
        return self._buckets.get_or_make(
            key, lambda: Bucket(self.rpm, self.tpm, share=self.share, charge=self.charge), now
        )
