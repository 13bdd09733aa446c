"""The objects that the parts of one batcher share; `microbatch.assembly` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.accounting.events import Listeners
    from microbatch.accounting.prices import Price
    from microbatch.accounting.stats import Ledger
    from microbatch.batching.admission import AdmissionQueue
    from microbatch.batching.bounds import Bounds
    from microbatch.batching.estimates import Estimates
    from microbatch.batching.scheduler import Scheduler
    from microbatch.batching.single_flight import InFlight, Settlement
    from microbatch.messages import Usage
    from microbatch.policy import FallbackPolicy, FlushPolicy
    from microbatch.transports.accounts import Accounts

    class Pricing(Protocol):
        """The signature of `PriceBook.pricing`."""

        def __call__(
            self,
            model: str | None,
            tier: str | None = None,
            *,
            asked: str | None = None,
            prompt_tokens: int | None = None,
        ) -> Callable[[Usage], float] | None:
            """Return what prices a usage of *model*, or None."""
            ...


@dataclass(frozen=True, slots=True)
class Dependencies:
    """The objects that the parts of one batcher share.

    Attributes:
        default_model: The transport's model, where neither caller nor endpoint names one; None if it has none.
        count: Returns the number of tokens of a text.
        exact: Returns whether *count* is the encoding of a model; None stands for the transport's.
        upper: Bounds the tokens of a text from above; None if its bytes do.
        price: Returns what prices a usage of a model, None if its price is unknown; see `PriceBook.pricing`.
        price_of: Returns the price of a model, None if it is unknown. The model None stands for the transport's.
        now: Returns the loop time, in seconds.
    """

    policy: FlushPolicy
    fallback: FallbackPolicy
    default_model: str | None
    ledger: Ledger
    listeners: Listeners
    accounts: Accounts
    count: Callable[[str], int]
    exact: Callable[[str | None], bool]
    upper: Callable[[str], int] | None
    price: Pricing
    price_of: Callable[[str | None], Price | None]
    now: Callable[[], float]
    bounds: Bounds
    estimates: Estimates
    scheduler: Scheduler
    admission: AdmissionQueue
    in_flight: InFlight
    settlement: Settlement
