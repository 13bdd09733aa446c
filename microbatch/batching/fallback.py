"""What is done about the requests that a combined call left open. Knows calls, but neither lanes nor slots.

- A reply that ended (or hit the token limit, or was cut off): if more than a quarter is open, one smaller combined call asks
  again, shuffled and under new ids, because the same prompt would get the same gaps; then every request still open goes alone,
  with its caller's own messages.
- A refusal that one request may be to blame for, be it the transport's own: the batch is halved until the culprits are alone.
  k culprits among n cost at most 1 + 2k * ceil(log2 n) calls.
- A reply whose bound was too low: one combined call asks again for all that is open.
- A reply without one sound element, or of a model that does not stop: every request goes alone at once.
- A reply that is the model's reasoning and nothing else: one request is asked alone first. If that brings no more, neither will the
  others.
- Anything else is no request's fault and would fail them again: every request fails with the error.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import anyio

from microbatch.batching.estimates import line_tokens
from microbatch.errors import UNPAID, BadRequest, ContextTooLong, MissingAnswer
from microbatch.prompt.outcome import ONLY_REASONING

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.batching.call_state import Batch
    from microbatch.batching.dispatch import Dispatcher
    from microbatch.batching.estimates import Estimates
    from microbatch.batching.permits import Permit
    from microbatch.batching.ticket import Ticket
    from microbatch.errors import ConfigError, RequestFailed
    from microbatch.policy import FallbackPolicy
    from microbatch.prompt.outcome import CallOutcome

_WORTH_ASKING_TOGETHER = 1 / 4

_TOO_LARGE = (413, 429)  # a 429 that is no RateLimited

_shuffle = secrets.SystemRandom().shuffle


class Fallback:
    """Asks again for what combined calls left open.

    Args:
        calls: Makes the calls.
        estimates: What they are charged.
        policy: How many at once.
        fail: Ends a ticket with a copy of an error of its own.

    Attributes:
        unpaid: Calls for what a cut had lost that were not made, because the retry budget was used up.
    """

    def __init__(
        self,
        calls: Dispatcher,
        estimates: Estimates,
        policy: FallbackPolicy,
        fail: Callable[[Ticket, RequestFailed | ConfigError], None],
    ) -> None:
        self._calls = calls
        self._estimates = estimates
        self._policy = policy
        self._fail = fail
        self.unpaid = 0

    async def recover(self, outcome: CallOutcome, batch: Batch, revised: Callable[[], int]) -> None:
        """See to it that every request that *outcome* left open ends, with an answer or an error.

        Args:
            outcome: How the call ended.
            batch: The call.
            revised: Called when the lane has learned something that its next batches should know at once; returns how many requests
                they hold.
        """
        recovery = _Recovery(self._calls, self._estimates, batch, self._fail, revised, self._policy.max_concurrent)
        try:
            await recovery.after(outcome, may_combine=True)
        finally:
            self.unpaid += recovery.unpaid


class _Recovery:
    """The fallback of one batch."""

    def __init__(
        self,
        calls: Dispatcher,
        estimates: Estimates,
        batch: Batch,
        fail: Callable[[Ticket, RequestFailed | ConfigError], None],
        revised: Callable[[], int],
        max_concurrent: int,
    ) -> None:
        self._calls = calls
        self._estimates = estimates
        self._history = batch.history
        self._account = batch.permit.account
        self._rank = batch.permit.rank
        self._fail = fail
        self._revised = revised
        self._at_once = anyio.Semaphore(max_concurrent)
        self.unpaid = 0

    async def after(self, outcome: CallOutcome, *, may_combine: bool) -> None:
        """Deal with what *outcome* left open; *may_combine* allows the one smaller combined call."""
        tickets = [item.ticket for item in outcome.open]
        too_many = outcome.ending == "length" and not (outcome.again or outcome.runaway)
        # A reply without one sound element says nothing of how many are too many.
        if too_many or (outcome.ending == "complete" and outcome.damaged and outcome.sound):
            self._history.halve(outcome.asked)
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
                self._history.shrink(line_tokens(tickets))
                self._revised()
            await self._halves(tickets)
        elif outcome.only_reasoning and not await self._answers(tickets[0]):
            for ticket in tickets:
                self._fail(ticket, MissingAnswer(ONLY_REASONING))
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
        self, groups: list[list[Ticket]], cut: RequestFailed | ConfigError | None = None, *, instead: bool = False
    ) -> None:
        """Ask each group, a few at a time; after a *cut*, as far as the retry budget goes; or one *instead* of a call before it."""
        async with anyio.create_task_group() as tasks:
            for group in groups:
                tasks.start_soon(self._ask, group, cut, instead)

    async def _ask(self, group: list[Ticket], cut: RequestFailed | ConfigError | None, instead: bool) -> None:
        async with self._at_once:
            group = [ticket for ticket in group if not ticket.done]
            if not group:
                return
            if cut is not None and not self._account.budget.draw():
                self.unpaid += 1
                error = cut.replica()
                error.add_note(UNPAID)
                for ticket in group:
                    self._fail(ticket, error)
                return
            cost = group[0].cost
            if len(group) > 1:
                cost = self._estimates.of_tickets(group, self._history, self._account.max_tokens)
            permit = self._account.permit(cost, self._rank, again=cut is not None)
            try:
                if not instead:
                    # It is composed when it has its slot, as new work is: a caller that leaves before that is not in it.
                    refusal = await self._calls.admit(group, permit)
                    if refusal is not None:
                        for ticket in group:
                            self._fail(ticket, refusal)
                        return
                outcome = await self._send([ticket for ticket in group if not ticket.done], permit, instead)
            finally:
                permit.finish()
        if outcome is not None:
            self._revised()
            await self.after(outcome, may_combine=instead)

    async def _send(self, group: list[Ticket], permit: Permit, instead: bool) -> CallOutcome | None:
        """Send *group*; return what the call left open, None if nothing."""
        if len(group) > 1:
            batch = self._calls.compose(group, self._history, permit, route="fallback", instead=instead)
            self._revised()  # only now, so that others of the lane do not try the same bound at the same time
            return await self._calls.batch(batch)
        for ticket in group:
            error = await self._calls.single(ticket, permit, history=self._history)
            if error is not None:
                self._fail(ticket, error)
        return None

    async def _answers(self, ticket: Ticket) -> bool:
        """Ask *ticket* alone; return whether there is more to the reply than reasoning. If so, or if it is answered, it has ended."""
        async with self._at_once:
            permit = self._account.permit(ticket.cost, self._rank)
            try:
                error = await self._calls.single(ticket, permit, history=self._history)
            finally:
                permit.finish()
        if error is not None and str(error) == ONLY_REASONING:
            return False
        if error is not None:
            self._fail(ticket, error)
        return True


def _chunks(tickets: list[Ticket], size: int) -> list[list[Ticket]]:
    return [tickets[start : start + size] for start in range(0, len(tickets), size)]


def _too_large(error: RequestFailed | ConfigError | None) -> bool:
    """Whether a prompt was refused for its size."""
    return isinstance(error, ContextTooLong) or (isinstance(error, BadRequest) and error.status in _TOO_LARGE)
