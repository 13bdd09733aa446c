"""What is done about the requests that a combined call left open. Knows calls, but neither lanes nor slots.

- A reply that ended (or hit the token limit, or was cut off): if more than a quarter is open, one smaller combined call asks
  again, shuffled and under new ids, because the same prompt would get the same gaps; then every request still open goes alone,
  with its caller's own messages.
- A reply whose bound was too low: one combined call asks again for all that is open.
- A reply without one sound element, or of a model that does not stop: every request goes alone at once.
- A refusal that one request may be to blame for: the batch is halved until the culprits are alone. k culprits among n cost at
  most 1 + 2k * ceil(log2 n) calls.
- Anything else is no request's fault and would fail them again: every request fails with the error.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import anyio

from microbatch.batching.cost import line_tokens
from microbatch.errors import BadRequest, ContextTooLong

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.batching.call import Calls
    from microbatch.batching.cost import Costs
    from microbatch.batching.exchange import Batch
    from microbatch.batching.ticket import Ticket
    from microbatch.batching.verdict import Outcome
    from microbatch.errors import RequestFailed
    from microbatch.policy import FallbackPolicy

_WORTH_ASKING_TOGETHER = 1 / 4

_CONTENT_TOO_LARGE = 413

_shuffle = secrets.SystemRandom().shuffle


class Fallback:
    """Asks again for what combined calls left open.

    Args:
        calls: Makes the calls.
        costs: What they are charged.
        policy: How many at once.
        fail: Ends a ticket with a copy of an error of its own.
    """

    def __init__(
        self,
        calls: Calls,
        costs: Costs,
        policy: FallbackPolicy,
        fail: Callable[[Ticket, RequestFailed], None],
    ) -> None:
        self._calls = calls
        self._costs = costs
        self._policy = policy
        self._fail = fail

    async def recover(self, outcome: Outcome, batch: Batch, revised: Callable[[], int]) -> None:
        """See to it that every request that *outcome* left open ends, with an answer or an error.

        Args:
            outcome: How the call ended.
            batch: The call.
            revised: Called when the lane has learned something that its next batches should know at once; returns how many requests
                they hold.
        """
        recovery = _Recovery(self._calls, self._costs, batch, self._fail, revised, self._policy.max_concurrent)
        await recovery.after(outcome, may_combine=True)


class _Recovery:
    """The fallback of one batch."""

    def __init__(
        self,
        calls: Calls,
        costs: Costs,
        batch: Batch,
        fail: Callable[[Ticket, RequestFailed], None],
        revised: Callable[[], int],
        max_concurrent: int,
    ) -> None:
        self._calls = calls
        self._costs = costs
        self._learned = batch.learned
        self._account = batch.permit.account
        self._fail = fail
        self._revised = revised
        self._at_once = anyio.Semaphore(max_concurrent)

    async def after(self, outcome: Outcome, *, may_combine: bool) -> None:
        """Deal with what *outcome* left open; *may_combine* allows the one smaller combined call."""
        tickets = [item.ticket for item in outcome.open]
        too_many = outcome.ending == "length" and not (outcome.again or outcome.runaway)
        # A reply without one sound element says nothing of how many are too many.
        if too_many or (outcome.ending == "complete" and outcome.damaged and outcome.sound):
            self._learned.halve(outcome.asked)
            self._revised()
        if not tickets:
            return
        if outcome.again:
            await self._together([tickets], instead=True)
            return
        if outcome.ending == "failed" and outcome.error is not None:
            for ticket in tickets:
                self._fail(ticket, outcome.error)
        elif outcome.ending == "refused":
            if _too_large(outcome.error):
                self._learned.shrink(line_tokens(tickets))
                self._revised()
            await self._halves(tickets)
        else:
            # What a cut has lost is asked for again at the expense of the retry budget: it is a retry of that part.
            cut = outcome.error if outcome.ending == "cut" else None
            of_use = outcome.sound and not outcome.runaway
            if may_combine and of_use and len(tickets) > outcome.asked * _WORTH_ASKING_TOGETHER:
                _shuffle(tickets)
                size = min(outcome.asked // 2, self._revised() if outcome.ending == "length" else outcome.asked)
                await self._together(_chunks(tickets, max(1, size)), cut)
            else:
                await self._together([[ticket] for ticket in tickets], cut)

    async def _halves(self, tickets: list[Ticket]) -> None:
        middle = (len(tickets) + 1) // 2
        await self._together([part for part in (tickets[:middle], tickets[middle:]) if part])

    async def _together(
        self, groups: list[list[Ticket]], cut: RequestFailed | None = None, *, instead: bool = False
    ) -> None:
        """Ask each group, a few at a time; after a *cut*, as far as the retry budget goes; or one *instead* of a call before it."""
        async with anyio.create_task_group() as tasks:
            for group in groups:
                tasks.start_soon(self._ask, group, cut, instead)

    async def _ask(self, group: list[Ticket], cut: RequestFailed | None, instead: bool) -> None:
        async with self._at_once:
            group = [ticket for ticket in group if not ticket.future.done()]
            if not group:
                return
            if cut is not None and not self._account.budget.draw():
                for ticket in group:
                    self._fail(ticket, cut)
                return
            again = cut is not None
            if len(group) == 1:
                await self._alone(group[0], again=again)
                return
            cost = self._costs.of_tickets(group, self._learned, self._account.max_tokens)
            permit = self._account.permit(cost, again=again)
            batch = self._calls.compose(group, self._learned, permit, route="fallback", instead=instead)
            self._revised()  # only now, so that others of the lane do not try the same bound at the same time
            outcome = await self._calls.batch(batch)
        self._revised()
        await self.after(outcome, may_combine=instead)

    async def _alone(self, ticket: Ticket, *, again: bool) -> None:
        permit = self._account.permit(ticket.cost, again=again)
        error = await self._calls.single(ticket, permit, learned=self._learned)
        if error is not None:
            self._fail(ticket, error)


def _chunks(tickets: list[Ticket], size: int) -> list[list[Ticket]]:
    return [tickets[start : start + size] for start in range(0, len(tickets), size)]


def _too_large(error: RequestFailed | None) -> bool:
    """Whether a prompt was refused for its size."""
    return isinstance(error, ContextTooLong) or (isinstance(error, BadRequest) and error.status == _CONTENT_TOO_LARGE)
