"""Asks again for the requests that a combined call left unanswered.

- After a reply that ended, hit the token limit or was cut off: if more than a quarter is unanswered, one smaller combined call asks
  again, shuffled and under new ids, because the same prompt would get the same gaps. Then every request still unanswered is sent alone,
  with its caller's own messages.
- After a refusal that one request may have caused, by the transport included: the batch is halved until the cause is alone. k causes
  among n requests take at most 1 + 2k * ceil(log2 n) calls.
- After a reply whose bound was too low: one combined call asks again for all that is unanswered.
- After a reply without one sound element, or of a model that does not stop: every request is sent alone at once.
- After a reply that is the model's reasoning and nothing else: one request is asked alone first. If it gets no more, all fail.
- Anything else has no cause in the requests and would fail them again: every request fails with the error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from microbatch.batching.estimates import line_tokens
from microbatch.errors import UNPAID, BadRequest, ContextTooLong, MissingAnswer
from microbatch.prompt.outcome import ONLY_REASONING

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.batching.call_state import Batch
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.dispatch import CallPath, Dispatcher
    from microbatch.batching.ticket import Ticket
    from microbatch.errors import ConfigError, RequestFailed
    from microbatch.prompt.outcome import CallOutcome
    from microbatch.transports.accounts import Permit

_WORTH_ASKING_TOGETHER = 1 / 4

_TOO_LARGE = (413, 429)  # a 429 that is no RateLimited


class Recovery:
    """The fallback of one batch: ends every request that its call left unanswered, with an answer or an error.

    *revised* is called when the lane's history has changed, for its next batches; it returns how many requests they hold.
    """

    def __init__(self, given: Dependencies, dispatcher: Dispatcher, batch: Batch, revised: Callable[[], int]) -> None:
        self._dispatcher = dispatcher
        self._count = given.count
        self._policy = given.policy
        self._estimates = given.estimates
        self._ledger = given.ledger
        self._fail = given.settlement.fail
        self._history = batch.history
        self._account = batch.permit.account
        self._rank = batch.permit.rank
        self._revised = revised
        self._at_once = anyio.Semaphore(given.fallback.max_concurrent)

    async def after(self, outcome: CallOutcome, asked: list[Ticket], *, may_combine: bool, path: CallPath = ()) -> None:
        """Deal with the *asked* requests that a call left unanswered; *may_combine* allows one smaller combined call.

        *path* is the call's place among those of this fallback: of each generation the number of the group, () for the batch itself.
        """
        tickets = [asked[position] for position in outcome.unanswered]
        sound = outcome.reply.sound
        too_many = outcome.ending == "length" and not (outcome.again or outcome.runaway)
        # A reply without one sound element does not show how many are too many.
        if too_many or (outcome.ending == "complete" and outcome.damaged and sound):
            self._history.halve(outcome.asked)
            self._revised()
        if not tickets:
            return
        if outcome.again:
            await self._together(self._chunks(tickets, len(tickets)), path, instead=True)
        elif outcome.ending == "failed" and outcome.error is not None:
            self._fail_all(tickets, outcome.error)
        elif outcome.ending == "refused":
            if _too_large(outcome.error):
                self._history.shrink(line_tokens(tickets))
                self._revised()
            middle = (len(tickets) + 1) // 2
            await self._together([half for half in (tickets[:middle], tickets[middle:]) if half], path)
        elif outcome.only_reasoning and await self._only_reasons(tickets[0]):
            self._fail_all(tickets, MissingAnswer(ONLY_REASONING))
        else:
            # Asking again for the part of a reply that a cut lost is a retry, so it draws on the retry budget.
            cut = outcome.error if outcome.ending == "cut" else None
            useful = sound and not outcome.runaway
            if may_combine and useful and len(tickets) > outcome.asked * _WORTH_ASKING_TOGETHER:
                size = min(outcome.asked // 2, self._revised() if outcome.ending == "length" else outcome.asked)
                await self._together(self._chunks(_shuffled(outcome, asked), max(1, size)), path, cut)
            else:
                await self._together([[ticket] for ticket in tickets], path, cut)

    def _chunks(self, tickets: list[Ticket], size: int) -> list[list[Ticket]]:
        """Return *tickets* in groups of at most *size*, each within the limits on prompts by what is known now."""
        quota = self._account.max_tokens
        most = self._estimates.budget(self._policy, tickets[0].spec, self._history, quota).tokens
        if line_tokens(tickets) > most:  # by their bounds
            for ticket in tickets:
                ticket.count(self._count)
        chunks: list[list[Ticket]] = []
        for ticket in tickets:
            if chunks and len(chunks[-1]) < size and line_tokens([*chunks[-1], ticket]) <= most:
                chunks[-1].append(ticket)
            else:
                chunks.append([ticket])
        return chunks

    def _fail_all(self, tickets: list[Ticket], error: RequestFailed | ConfigError) -> None:
        for ticket in tickets:
            self._fail(ticket, error)

    async def _together(
        self,
        groups: list[list[Ticket]],
        path: CallPath,
        cut: RequestFailed | ConfigError | None = None,
        *,
        instead: bool = False,
    ) -> None:
        """Ask each group, a few at a time; after a *cut* the retry budget pays; *instead* of a call whose bound was too low."""
        async with anyio.create_task_group() as tasks:
            for number, group in enumerate(groups):
                tasks.start_soon(self._ask, group, (*path, number), cut, instead)

    async def _ask(
        self, group: list[Ticket], path: CallPath, cut: RequestFailed | ConfigError | None, instead: bool
    ) -> None:
        async with self._at_once:
            group = [ticket for ticket in group if not ticket.done]
            if not group:
                return
            if cut is not None and not self._account.budget.draw():
                self._ledger.retries_denied += 1
                error = cut.replica()
                error.add_note(UNPAID)
                self._fail_all(group, error)
                return
            cost = group[0].cost
            if len(group) > 1:
                spec, tokens, quota = group[0].spec, line_tokens(group), self._account.max_tokens
                cost = self._estimates.together(spec, self._history, len(group), tokens, quota)
            permit = self._account.permit(cost, self._rank, again=cut is not None)
            try:
                if not instead:
                    # A call is composed when it has its slot, as new work is, so that callers who leave before are not in it.
                    refusal = await self._dispatcher.admit(group, permit)
                    if refusal is not None:
                        self._fail_all(group, refusal)
                        return
                    group = [ticket for ticket in group if not ticket.done]
                outcome = await self._send(group, path, permit, instead)
            finally:
                permit.finish()
        if outcome is not None:
            self._revised()
            await self.after(outcome, group, may_combine=instead, path=path)

    async def _send(self, group: list[Ticket], path: CallPath, permit: Permit, instead: bool) -> CallOutcome | None:
        """Send *group*; return how the call ended, None if nothing is unanswered."""
        if len(group) > 1:
            batch = self._dispatcher.compose(group, self._history, permit, route="fallback", instead=instead, path=path)
            self._revised()  # only now, so that others of the lane do not try the same bound at the same time
            return await self._dispatcher.batch(batch)
        for ticket in group:
            error = await self._dispatcher.single(ticket, permit, history=self._history)
            if error is not None:
                self._fail(ticket, error)
        return None

    async def _only_reasons(self, ticket: Ticket) -> bool:
        """Ask *ticket* alone; return whether the reply is reasoning and nothing else. If not, the ticket has ended."""
        async with self._at_once:
            permit = self._account.permit(ticket.cost, self._rank)
            try:
                error = await self._dispatcher.single(ticket, permit, history=self._history)
            finally:
                permit.finish()
        if error is None:
            return False
        if ticket.call is not None and ticket.call.only_reasoning:
            return True
        self._fail(ticket, error)
        return False


def _shuffled(outcome: CallOutcome, asked: list[Ticket]) -> list[Ticket]:
    """Return the *asked* requests that are unanswered in the order of the random parts of their ids, the same for the same call."""
    ids = outcome.reply.ids
    return [asked[position] for position in sorted(outcome.unanswered, key=lambda at: ids[at].lstrip("0123456789"))]


def _too_large(error: RequestFailed | ConfigError | None) -> bool:
    """Return whether a prompt was refused for its size."""
    return isinstance(error, ContextTooLong) or (isinstance(error, BadRequest) and error.status in _TOO_LARGE)
