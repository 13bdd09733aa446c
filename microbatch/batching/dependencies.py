"""The objects that the parts of one batcher share; `microbatch.assembly` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.accounting.events import Listeners
    from microbatch.accounting.stats import Ledger
    from microbatch.batching.admission import AdmissionQueue
    from microbatch.batching.batch_limits import BatchLimits
    from microbatch.batching.estimates import Estimates
    from microbatch.batching.scheduler import Scheduler
    from microbatch.batching.single_flight import InFlight, Settlement
    from microbatch.policy import FlushPolicy
    from microbatch.transports.accounts import Accounts


@dataclass(frozen=True, slots=True)
class Dependencies:
    """The objects that the parts of one batcher share.

    Attributes:
        count: Returns the number of tokens of a text.
        upper: Bounds the tokens of a text from above; None if its bytes do.
        ratio: Returns the price of a generated token of a model in prompt tokens.
        now: Returns the loop time, in seconds.
    """

    policy: FlushPolicy
    ledger: Ledger
    listeners: Listeners
    accounts: Accounts
    count: Callable[[str], int]
    upper: Callable[[str], int] | None
    ratio: Callable[[str | None], float]
    now: Callable[[], float]
    limits: BatchLimits
    estimates: Estimates
    scheduler: Scheduler[Any]
    admission: AdmissionQueue
    in_flight: InFlight
    settlement: Settlement
