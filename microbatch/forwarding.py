"""Requests that are relayed to the endpoint as they are, each in a slot of its own, and paid from the budget."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from microbatch.batching.ticket import NORMAL, UNSHARED
from microbatch.errors import ConfigError, ConnectFailed
from microbatch.transports.credentials import credentials_in
from microbatch.transports.expenses import Expense
from microbatch.transports.relay import UsageReader, asked_tier, expected_usage, read_charge

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from microbatch.assembly import Assembly
    from microbatch.batching.ticket import SlotLease
    from microbatch.messages import Usage
    from microbatch.spending.spending import Charge, Spending
    from microbatch.transports.relay import Forwarded

_REFUSALS = range(400, 500)
"""Statuses of answers that cost nothing."""

_PERMIT_LOOK: Final = 1.0
"""Seconds between two tries for a permit while calls of the same account can only be refused, so that slots come without one."""


@asynccontextmanager
async def forwarded(
    parts: Assembly,
    method: str,
    path: str,
    headers: Mapping[str, str],
    body: bytes | None,
    *,
    alone: Sequence[str],
    tenant: str | None,
) -> AsyncGenerator[Forwarded]:
    """Relay a request; see `Microbatcher.forward`."""
    transport, ledger = parts.settings.transport, parts.ledger
    relay = getattr(transport, "forward", None)
    if relay is None:
        raise ConfigError(f"{type(transport).__name__} has no forward(): it cannot relay requests as they are")
    model, cost = read_charge(body)
    credentials = {**headers, **credentials_in(path)}
    expected = expected_usage(body)
    expense = None if expected is None else Expense(expected, model, tenant, tier=asked_tier(body))
    await parts.admission.acquire(NORMAL, None, UNSHARED)
    async with AsyncExitStack() as relayed:
        relayed.callback(parts.admission.release)
        lease_slot = partial(parts.engine.lease_slot, model, credentials, cost)
        lease, charge = await _paid_slot(parts, relayed, lease_slot, expense)
        bill = await relayed.enter_async_context(_charged(parts.spending, charge))
        parts.engine.check_running()  # it may have closed since the slot was granted
        lease.used = True
        ledger.upstream_calls += 1
        ledger.forwarded += 1
        parts.intake.note_alone(alone)
        bill.sent = True
        try:
            response = await relayed.enter_async_context(relay(method, path, headers, body))
        except ConfigError:
            lease.used = bill.sent = False
            ledger.upstream_calls -= 1
            ledger.forwarded -= 1
            raise
        if expense is not None:
            usage = bill.watch(response)
            response.spent = partial(_spent, parts, model, usage)
        yield response


def _spent(parts: Assembly, model: str | None, reader: UsageReader) -> tuple[Usage, float | None] | None:
    """Return the usage that *reader* has found and its price in US dollars, None if that is unknown; None if it has found none."""
    usage = reader.usage
    if usage is None:
        return None
    price = parts.prices.pricing(model, reader.tier)
    return usage, None if price is None else price(usage)


class _Bill:
    """The cost of a relayed request.

    Attributes:
        sent: Whether the request was sent, and not refused.
        usage: The reader of the usage in the answer; None before there is an answer.
    """

    def __init__(self) -> None:
        self.sent: bool = False
        self.usage: UsageReader | None = None

    def watch(self, response: Forwarded) -> UsageReader:
        """Return a reader of the usage, which reads the bytes of *response* as they are passed on."""
        self.sent = response.status not in _REFUSALS
        self.usage = reader = UsageReader(response.headers.get("Content-Encoding"))
        response.on_chunk = reader.feed
        return reader


async def _paid_slot(
    parts: Assembly,
    relayed: AsyncExitStack,
    lease_slot: Callable[[], AbstractAsyncContextManager[SlotLease]],
    expense: Expense | None,
) -> tuple[SlotLease, Charge | None]:
    """Return a slot, which *relayed* gives back in the end, and what was charged for its use, None for nothing.

    It is charged when nothing has to be waited for any more, because other calls may wait until it ends; and while it has to wait
    for them, or for a permit that did not come with the slot, it holds no slot.
    """
    while True:
        async with AsyncExitStack() as taken:
            lease = await taken.enter_async_context(lease_slot())
            permit = lease.granted.result()
            wait = permit.account.pay_lent(permit)
            if wait:
                until = _after(min(wait, _PERMIT_LOOK))
            else:
                charge = None if parts.spending is None or expense is None else await parts.spending.charge(expense)
                if not isinstance(charge, asyncio.Future):
                    relayed.push_async_exit(taken.pop_all())
                    return lease, charge
                until = charge
        await parts.engine.rest(until)


def _after(seconds: float) -> asyncio.Future[None]:
    """Return a future that is done after *seconds*."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        if not future.done():
            future.set_result(None)

    timer = loop.call_later(seconds, end)
    future.add_done_callback(lambda _: timer.cancel())
    return future


@asynccontextmanager
async def _charged(spending: Spending | None, charge: Charge | None) -> AsyncGenerator[_Bill]:
    """Correct *charge* after the block by what is found in it; None costs nothing."""
    if spending is None or charge is None:
        yield _Bill()
        return
    bill = _Bill()
    try:
        yield bill
    except ConnectFailed as error:
        bill.sent = bill.sent and not error.unsent
        raise
    finally:
        answer = bill.usage
        if not bill.sent:
            await spending.give_back(charge)
        elif answer is None or answer.usage is None:
            spending.keep(charge)
        else:
            await spending.correct(charge, answer.usage, tier=answer.tier)
