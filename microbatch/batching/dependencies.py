"""What the parts of one batcher share; `microbatch.assembly` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.accounting.events import Listeners
    from microbatch.accounting.stats import Ledger
    from microbatch.batching.permits import Accounts
    from microbatch.messages import Usage
    from microbatch.policy import FallbackPolicy, FlushPolicy


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What the parts of one batcher share.

    Attributes:
        policy: When requests leave, and how much may be under way.
        fallback: What is done about missing and broken answers.
        model: The transport's model; None if it has none.
        ledger: Counts everything that `Stats` shows.
        listeners: Receive the events.
        accounts: Give the permits.
        count: Returns the number of tokens of a text.
        upper: Bounds the tokens of a text from above; None if its bytes do.
        price: Returns what prices the usage of a model, or None.
        ratio: Returns the price of a generated token of a model in prompt tokens.
        now: Returns the loop time, in seconds.
    """

    policy: FlushPolicy
    fallback: FallbackPolicy
    model: str | None
    ledger: Ledger
    listeners: Listeners
    accounts: Accounts
    count: Callable[[str], int]
    upper: Callable[[str], int] | None
    price: Callable[[str | None], Callable[[Usage], float] | None]
    ratio: Callable[[str | None], float]
    now: Callable[[], float]
