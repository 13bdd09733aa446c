"""`Budget`: the most that calls may cost, in dollars or tokens, in all or per hour, day or month."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from microbatch.checking import AtLeast, Count, check_fields
from microbatch.errors import ConfigError
from microbatch.spending.counters import Counters, Period
from microbatch.spending.shared import SharedCounters

Per = Literal["batcher", "tenant"]


@dataclass(eq=False)
class Budget:
    """The most that calls may cost.

    Before a call leaves, its expected cost is charged: its prompt, and answers as long as those before it. Afterwards the charge is
    corrected by the usage that the endpoint reports. So at most the budget and the calls under way are spent. Calls that might still
    fit once others under way in this process have ended wait for those; one that would exceed the budget is not sent, and its
    requests end with `BudgetExceeded`. Retries, calls that ask again, audits and relayed requests count; a call that was cancelled
    or has failed keeps its charge, unless it never left or was refused. Audits are made only while more than half of the budget is
    left.

    Several batchers may share one object, and then have one budget together. What is spent is counted by this object and forgotten
    with it, unless there is a *store*.

    Args:
        usd: US dollars, by the prices of the batcher. Each model needs a price then. None sets no limit.
        tokens: Tokens, prompts and answers together. None sets no limit.
        period: "hour", "day" or "month" (of the calendar, in UTC), after which the budget is whole again. None: never.
        per: "tenant" gives each tenant a budget of its own, with requests without a tenant as one more; "batcher" has one for all.
            Of tenants beyond the 10,000 that have spent most, the most that one of them can have spent counts as spent.
        store: Address of a Redis server, `redis://host:6379/0`, that counts for all processes with the same address, *period* and
            *per*. Another database number makes another budget. The server has to keep its keys: do not use one that evicts them. If
            it cannot be used, nothing is sent: requests end with `BudgetExceeded`.

    Raises:
        ConfigError: A setting is out of range, there is no limit, or the store's address or package is wrong.
    """

    usd: Annotated[float, AtLeast(0)] | None = None
    tokens: Count | None = None
    period: Period | None = None
    per: Per = "batcher"
    store: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.usd is None and self.tokens is None:
            raise ConfigError("a Budget needs usd= or tokens=")
        if self.usd is not None and math.isinf(self.usd):
            raise ConfigError(f"usd must be a finite number, got {self.usd!r}")
        self.counters: Counters = Counters(self.period)
        self.shared: SharedCounters | None = None if self.store is None else SharedCounters(self.store, self.per)

    def __repr__(self) -> str:
        """Return the limits, without the store's address, which may hold a password."""
        limits = f"usd={self.usd}, tokens={self.tokens}, period={self.period!r}, per={self.per!r}"
        return f"Budget({limits}{'' if self.store is None else ', store=...'})"
