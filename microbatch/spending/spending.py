"""Pays for the calls of one batcher from a `Budget`."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import anyio
import msgspec

from microbatch.accounting.budget import BudgetFigures
from microbatch.errors import (
    AuthFailed,
    BadRequest,
    BudgetExceeded,
    ConfigError,
    ConnectFailed,
    ContextTooLong,
    QuotaExhausted,
    RateLimited,
    RequestFailed,
    ShutDown,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from microbatch.batching.dependencies import Pricing
    from microbatch.messages import Usage
    from microbatch.protocols import Completion
    from microbatch.spending.budget import Budget
    from microbatch.spending.counters import Counter
    from microbatch.transports.expenses import Expense


logger: Final = logging.getLogger("microbatch")

SPARE_SHARE: Final = 0.5
"""The part of a budget that audits may use; the rest is left to requests, and audits are made at the beginning rather than the end."""

_REFUSALS: Final = (AuthFailed, BadRequest, ContextTooLong, QuotaExhausted, RateLimited, ShutDown)
"""Errors of attempts that were not made, or refused before the model read them; no endpoint charges for these."""

# Sums of floats may exceed an exact limit by this part of it.
_TOLERANCE: Final = 1e-9


class Charge(msgspec.Struct, eq=False):
    """The charge of one attempt: dollars, tokens, and the model that was asked."""

    counter: Counter
    usd: float
    tokens: int
    model: str | None


class Spending:
    """The spending of one batcher's calls from *budget*; see `Purse`.

    Args:
        budget: Where it is counted; may be shared.
        price: Returns what prices a usage of a model, None if its price is unknown; see `PriceBook.pricing`.
        default_model: The transport's model, or None.
    """

    def __init__(self, budget: Budget, price: Pricing, default_model: str | None) -> None:
        self._budget = budget
        self._price = price
        self._default_model = default_model
        self._now = time.time  # noqa: TID251 periods are those of the calendar
        self._refused = 0
        self._store_failed = False

    def check(self, models: Iterable[str | None]) -> None:
        """Check that calls to *models* can be paid for, None for the transport's.

        Raises:
            ConfigError: The budget is in dollars, and the price of one is not known.
        """
        if self._budget.usd is None:
            return
        for model in models:
            name = model or self._default_model
            if self._price(name) is None:
                of = "requests that name no model" if name is None else f"the model {name!r}"
                raise ConfigError(
                    f"a budget in US dollars needs the price of each model, and none is known for {of}: give prices= "
                    "(the flag --prices), or a budget in tokens"
                )

    # --- charges

    async def charge(self, expense: Expense) -> Charge | asyncio.Future[None]:
        """Charge *expense*, or return a future after which to try again: a call under way has ended then, or the period has.

        Raises:
            BudgetExceeded: It is more than is left.
            ConfigError: Its price is not known.
        """
        self.check([expense.model])
        model = expense.model or self._default_model
        price = self._price(model, expense.tier)
        usd = 0.0 if price is None else price(expense.usage)
        tokens = expense.usage.prompt_tokens + expense.usage.completion_tokens
        budget = self._budget
        counter = budget.counters.of(expense.tenant if budget.per == "tenant" else None, self._now())
        share = SPARE_SHARE if expense.spare else 1.0
        most_usd = None if budget.usd is None else budget.usd * share * (1 + _TOLERANCE)
        most_tokens = None if budget.tokens is None else int(budget.tokens * share)
        try:
            added, ended = False, None
            while not added and ended != counter.ended:  # a correction may have overtaken the refusal
                ended = counter.ended
                added = await self._add_whole(counter, usd, tokens, most_usd, most_tokens)
        except StorageError as error:
            self._refused += not expense.spare
            self._note_store(error)
            message = f"not sent: the store of the budget cannot be used, so what is left is not known ({error})"
            raise BudgetExceeded(message) from error
        if added:
            counter.hold(usd, tokens)
            return Charge(counter, usd, tokens, model)
        settled_usd, settled_tokens = counter.usd - counter.held_usd, counter.tokens - counter.held_tokens
        if (
            counter.calls
            and not expense.spare
            and _fits(settled_usd + usd, settled_tokens + tokens, most_usd, most_tokens)
        ):
            return self._change_of(counter)
        self._refused += not expense.spare
        raise self._exceeded(counter, usd, tokens)

    def _change_of(self, counter: Counter) -> asyncio.Future[None]:
        """Return a future that is done when a call on *counter* has ended, or its period has."""
        loop = asyncio.get_running_loop()
        change: asyncio.Future[None] = loop.create_future()
        counter.waiting.append(change)
        if counter.span.end is not None:
            timer = loop.call_later(max(0.0, counter.span.end - self._now()), _set, change)
            change.add_done_callback(lambda _: timer.cancel())
        return change

    async def ended(self, charge: Charge, outcome: Completion | RequestFailed, *, heard: bool) -> None:
        """See `Purse.ended`."""
        if not isinstance(outcome, RequestFailed):
            if outcome.usage is None:
                self.keep(charge)
            else:
                await self.correct(charge, outcome.usage, outcome.model, outcome.service_tier)
        elif not heard and (
            isinstance(outcome, _REFUSALS) or (isinstance(outcome, ConnectFailed) and (outcome.unsent or outcome.again))
        ):
            await self.give_back(charge)
        else:
            self.keep(charge)

    async def correct(self, charge: Charge, usage: Usage, model: str | None = None, tier: str | None = None) -> None:
        """Correct *charge* to the price of *usage*, of the *model* that answered in the service *tier*, both None if not reported."""
        price = self._price(model, tier, asked=charge.model)
        tokens = usage.prompt_tokens + usage.completion_tokens
        # Without a price, as when the user's function fails, the expected cost is all that is known.
        await self._correct(charge, charge.usd if price is None else price(usage), tokens)

    async def give_back(self, charge: Charge) -> None:
        """See `Purse.give_back`."""
        await self._correct(charge, 0.0, 0)

    def keep(self, charge: Charge) -> None:
        """See `Purse.keep`."""
        charge.counter.release(charge.usd, charge.tokens)

    async def _correct(self, charge: Charge, usd: float, tokens: int) -> None:
        try:
            await self._add(charge.counter, usd - charge.usd, tokens - charge.tokens)
        except StorageError as error:
            self._note_store(error)  # the charge stands
        finally:
            self.keep(charge)

    async def _add_whole(
        self, counter: Counter, usd: float, tokens: int, most_usd: float | None, most_tokens: int | None
    ) -> bool:
        """Add as `_add` does, and nothing if it is cancelled."""
        adding = self._add(counter, usd, tokens, most_usd, most_tokens)
        if self._budget.shared is None:
            return await adding
        task = asyncio.ensure_future(adding)  # noqa: TID251 it ends before this returns
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # The command may be on its way, and what it adds is known when it has been answered.
            with anyio.CancelScope(shield=True), suppress(StorageError):
                if await task:
                    await self._add(counter, -usd, -tokens)
            raise

    async def _add(
        self, counter: Counter, usd: float, tokens: int, most_usd: float | None = None, most_tokens: int | None = None
    ) -> bool:
        """Add to *counter*, unless a total would exceed its limit; return whether it was added."""
        if self._budget.shared is not None:
            added = await self._budget.shared.add(counter, usd, tokens, most_usd, most_tokens)
            self._store_failed = False
            return added
        if not _fits(counter.usd + usd, counter.tokens + tokens, most_usd, most_tokens):
            return False
        counter.usd += usd
        counter.tokens += tokens
        return True

    def _note_store(self, error: StorageError) -> None:
        if not self._store_failed:  # once for each outage
            self._store_failed = True
            logger.warning("the store of the budget cannot be used, and nothing is sent without it: %s", error)

    def _exceeded(self, counter: Counter, usd: float, tokens: int) -> BudgetExceeded:
        budget, parts = self._budget, list[str]()
        if budget.usd is not None:
            parts.append(f"about ${usd:.4f}, and ${counter.usd:.4f} of ${budget.usd:g} are spent")
        if budget.tokens is not None:
            parts.append(f"about {tokens:,} tokens, and {counter.tokens:,} of {budget.tokens:,} are spent")
        end = counter.span.end
        left = None if end is None else max(0.0, end - self._now())
        until = "" if left is None else f"; the next {budget.period} begins in {left:.0f} s"
        return BudgetExceeded(f"not sent: the call would cost {'; '.join(parts)}{until}", retry_after=left)

    # --- looking

    def figures(self) -> BudgetFigures:
        """Return what was spent in the present period, and what is left of it; with a store, as of the latest call."""
        budget = self._budget
        usd, tokens = budget.counters.total(self._now())
        one = budget.per == "batcher"
        return BudgetFigures(
            spent_usd=None if budget.usd is None else usd,
            left_usd=None if budget.usd is None or not one else max(0.0, budget.usd - usd),
            spent_tokens=tokens,
            left_tokens=None if budget.tokens is None or not one else max(0, budget.tokens - tokens),
            refused=self._refused,
        )


def _set(change: asyncio.Future[None]) -> None:
    if not change.done():
        change.set_result(None)


def _fits(usd: float, tokens: int, most_usd: float | None, most_tokens: int | None) -> bool:
    return (most_usd is None or usd <= most_usd) and (most_tokens is None or tokens <= most_tokens)
