"""Audits: asks again alone what was answered in a batch, and limits the size of batches by what the comparison shows.

The item is drawn when the batch is composed, uniformly over its positions, at most one of each batch, because the answers of one reply
fail together. Its audit is a call of the lowest priority, outside cache and single flight, for which no caller waits. See
`microbatch.audit` for the comparison and the evidence.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microbatch.accounting.audits import Audited
from microbatch.audit.comparison import agree, can_compare, score
from microbatch.audit.lane_kind import RATE_AFTER_CERTIFICATE, sizes_in, step_of
from microbatch.batching.attribution import estimated_call
from microbatch.batching.call_state import Sample
from microbatch.batching.overhead import in_prompt_tokens
from microbatch.batching.ticket import LOW, SlotLease
from microbatch.errors import BudgetExceeded, ConfigError, RequestFailed, ShutDown
from microbatch.transports.credentials import hold_credentials

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping

    from microbatch.accounting.audits import AuditedSize, Decision
    from microbatch.audit.lane_kind import LaneKind, LaneKinds, StepRecord
    from microbatch.batching.call_state import AloneAnswer, Batch
    from microbatch.batching.dependencies import Dependencies
    from microbatch.batching.dispatch import Dispatcher
    from microbatch.batching.single_queue import SingleQueues
    from microbatch.batching.ticket import Spec, Ticket
    from microbatch.messages import Usage
    from microbatch.policy import AuditPolicy

    Start = Callable[[Callable[[], Coroutine[Any, Any, None]]], object]
    Correct = Callable[[Ticket, AloneAnswer], Awaitable[None]]

logger: Final = logging.getLogger("microbatch")

_MOST: Final = 64
"""Audits of a kind under way beyond which no item is sampled, so that a slow endpoint does not pile them up."""


class Audits:
    """The audits of one batcher.

    Args:
        given: What the parts of the batcher share.
        policy: See `AuditPolicy`.
        kinds: The record of each kind of lane.
        dispatcher: Asks alone.
        singles: The queues in which audits wait.
        draw: Decides which items are sampled.
        correct: Replaces the cached answer of a ticket; None without a cache.

    Attributes:
        kinds: As given.
        callers_pay: Returns whether requests with these headers are paid for by their callers.
    """

    def __init__(
        self,
        given: Dependencies,
        policy: AuditPolicy,
        kinds: LaneKinds,
        *,
        dispatcher: Dispatcher,
        singles: SingleQueues,
        draw: random.Random,
        correct: Correct | None,
    ) -> None:
        self.kinds = kinds
        self.callers_pay: Callable[[Mapping[str, str]], bool] = hold_credentials
        self._given = given
        self._policy = policy
        self._dispatcher = dispatcher
        self._singles = singles
        self._draw = draw
        self._correct = correct
        self._leases: dict[SlotLease, None] = {}  # of audits that wait; an ordered set
        self._now = time.time  # noqa: TID251 cached answers outlive processes
        self._under_way = 0
        self._ended = asyncio.Event()
        self._closed = False
        self._start: Start
        self._changed: Callable[[LaneKind], None]

    def start(self, start: Start, changed: Callable[[LaneKind], None]) -> None:
        """Begin: *start* runs a task; *changed* is called when the limit of a kind has changed, or bulk work need not wait for it."""
        self._start, self._changed = start, changed

    def close(self) -> None:
        """Drop the audits that are not sent, and begin no more."""
        self._closed = True
        for lease in [*self._leases]:
            lease.refuse(ShutDown("the batcher closed before this audit was sent"))

    async def settled(self) -> None:
        """Wait until no audit is under way."""
        while self._under_way:
            self._ended.clear()
            await self._ended.wait()

    # --- kinds of lanes

    def state(self) -> list[LaneKind]:
        """Return the records of all kinds as they are kept for another process, without the audits under way."""
        return [msgspec.structs.replace(kind, under_way=0) for kind in self.kinds.values()]

    def restore(self, kinds: Iterable[LaneKind]) -> None:
        """Go on from the records that `state` has returned in an earlier process; there are no requests yet."""
        for kind in kinds:
            self.kinds.put(kind.digest, kind)

    def give_up_tries(self) -> None:
        """Give up new tries of condemned sizes that are undecided, because there may be no further requests to decide them."""
        for kind in self.kinds.values():
            if kind.give_up_tries():
                kind.doubt(self._now())
                self._changed(kind)

    def is_condemned(self, digest: str, size: int, given_at: float = math.inf) -> bool:
        """Return whether answers from batches of *size* requests of the kind named *digest* are asked for anew; see `LaneKind`."""
        kind = self.kinds.get(digest) if self._policy.adapt else None
        return kind is not None and kind.is_condemned(size, given_at)

    def figures(self) -> Iterator[AuditedSize]:
        """Yield what the audits have found so far."""
        for kind in self.kinds.values():
            yield from kind.figures()

    def count(self, kind: LaneKind, requests: int) -> None:
        """Count *requests* that leave a lane of *kind*."""
        self.kinds.put(kind.digest, kind)  # or a lane that is in use all the time would count as unused
        if self._policy.adapt and kind.grows(requests, self._given.policy.max_batch_size):
            kind.doubt(self._now())
            self._changed(kind)

    # --- samples

    def sample(self, batch: Batch) -> None:
        """Draw an item of *batch*, which has just been composed, or none."""
        spec, size = batch.tickets[0].spec, len(batch.tickets)
        kind, step = spec.kind, step_of(size)
        if kind is None or self._closed or kind.under_way >= _MOST or not self._may_audit(spec):
            return
        record = kind.record(step)
        if self._draw.random() < size * self._rate(record):
            batch.audited = Sample(batch.tickets[self._draw.randrange(size)], kind, step, record, batch.history)
            record.asked += 1
            kind.under_way += 1
            self._under_way += 1

    def _may_audit(self, spec: Spec) -> bool:
        return self._policy.audit_own_keys or not self.callers_pay(spec.headers)

    def _rate(self, record: StepRecord) -> float:
        """Return the share of the items that is sampled now."""
        policy = self._policy
        if policy.rate != "auto":
            return policy.rate
        if record.certified:
            return RATE_AFTER_CERTIFICATE
        return 1.0 if record.can_afford(policy.max_overhead) else 0.0

    def call_ended(self, batch: Batch) -> None:
        """Note that the call of *batch* is over and what it has cost, and audit the item drawn, if the call has answered it."""
        spec, sample = batch.tickets[0].spec, batch.audited
        usage = batch.call_state.usage
        if usage is None and batch.reply.heard:
            usage = estimated_call(spec.shared_chars + sum(batch.line_bytes), sum(batch.answer_bytes))
        if spec.kind is not None and usage is not None:
            spec.kind.record(step_of(len(batch.tickets))).calls_cost += self._cost(spec, usage)
        if sample is None or sample.ticket.reply is None or not sample.ticket.caller.audited or self._closed:
            self.void(batch)
            return
        batch.audited = None
        sample.text = sample.ticket.reply.text
        if can_compare(sample.ticket.answer, sample.text, self._policy.same):
            self._start(lambda: self._audit(sample))
        else:
            self._settle(sample, None)
            self._end(sample)

    def void(self, batch: Batch) -> None:
        """Forget the item drawn of *batch*, if there is one: the call has not answered it."""
        sample, batch.audited = batch.audited, None
        if sample is not None:
            self._end(sample, dropped=True)

    def _end(self, sample: Sample, *, dropped: bool = False) -> None:
        sample.record.asked -= dropped
        self._under_way -= 1
        self._ended.set()
        if sample.kind.audit_ended():
            self._changed(sample.kind)

    def _cost(self, spec: Spec, usage: Usage) -> float:
        """Return a cost that can be compared, in prompt tokens."""
        price = self._given.price_of(spec.model)
        return in_prompt_tokens(usage, None if price is None else price.of_tier(spec.tier))

    # --- audits

    async def _audit(self, sample: Sample) -> None:
        settled: tuple[int | None, bool] | None = None
        unpaid = False
        try:
            settled = await self._scored(sample)
            if settled is not None:
                self._settle(sample, *settled)
        except BudgetExceeded:
            unpaid = True
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a Rust panic is no Exception, and must not end the batcher
            logger.exception("an audit failed in microbatch itself")
        finally:
            # One that has failed counts as asked.
            self._end(sample, dropped=unpaid or (settled is None and self._closed))

    async def _scored(self, sample: Sample) -> tuple[int | None, bool] | None:
        """Ask for *sample* alone, and return its score and whether the first answer alone differs; None if the batcher closes.

        Raises:
            BudgetExceeded: Nothing was asked.
        """
        ticket, same = sample.ticket, self._policy.same
        first = await self._ask(sample)
        if first is None or first.text is None:
            return None if self._closed else (None, False)
        agrees = agree(ticket.answer, sample.text, first.text, same)
        if agrees is None or agrees:
            return (None if agrees is None else 0), False
        second: AloneAnswer | None = None
        with suppress(BudgetExceeded):
            second = await self._ask(sample)
            if second is None or second.text is None:
                # Once more: items that fail here are those that differ, and the excess would be estimated too low without them.
                second = await self._ask(sample)
        if second is None or second.text is None:
            return None if self._closed else (None, True)
        scored = score(
            first=agree(ticket.answer, first.text, second.text, same),
            batched=agree(ticket.answer, sample.text, second.text, same),
        )
        if scored == 1 and self._correct is not None and ticket.caller.key is not None:
            await self._correct(ticket, first)
        return scored, True

    async def _ask(self, sample: Sample) -> AloneAnswer | None:
        """Ask for the item alone; return None if no reply came. Raise `BudgetExceeded` if it was not asked for that reason."""
        ticket, given = sample.ticket, self._given
        spec = ticket.spec
        account = given.accounts.of(spec.model, spec.headers)
        cost = 0 if account.max_tokens is None else min(account.max_tokens, ticket.cost)
        lease = SlotLease(cost, asyncio.get_running_loop().create_future(), asyncio.Event(), rank=LOW)
        if self._closed:
            return None
        self._leases[lease] = None
        self._singles.add(lease, None, account)
        answer: AloneAnswer | None = None
        try:
            permit = await lease.granted
            answer = await self._dispatcher.ask_again(ticket, permit, sample.history)
        except BudgetExceeded:
            raise
        except (RequestFailed, ConfigError):
            if lease.granted.exception() is not None:
                return None  # refused, so that nothing was sent
            # Else its prompt counts below, or audits that always fail would cost nothing.
        finally:
            del self._leases[lease]
            lease.give_back()
        text, usage = ("", None) if answer is None else (answer.text or "", answer.usage)
        usage = usage or estimated_call(spec.shared_chars + len(ticket.line), len(text))
        sample.record.audits_cost += self._cost(spec, usage)
        return answer

    def _settle(self, sample: Sample, scored: int | None, different: bool = False) -> None:
        """Enter the score of *sample*, None if its answers cannot be compared, and act on what it decides."""
        kind, step, record, policy = sample.kind, sample.step, sample.record, self._policy
        record.audits_ended += 1
        decision: Decision | None = None
        if scored is None:
            record.not_comparable += 1
        else:
            record.different += different
            if record is kind.steps.get(step):  # else the step has been tried again since
                decision = kind.add(step, scored, policy.max_excess, adapt=policy.adapt)
        if decision == "condemned" and policy.adapt:
            kind.doubt(self._now(), step)
            self._note_condemned(kind, step)
            self._changed(kind)
        notify = self._given.listeners.audit
        if notify is not None:
            notify(
                Audited(
                    kind=kind.digest,
                    model=kind.model,
                    size=step,
                    score=scored,
                    decision=decision,
                    limit=kind.limit,
                    differs=different,
                )
            )

    def _note_condemned(self, kind: LaneKind, step: int) -> None:
        excess, accepted = kind.record(step).evidence.excess, self._policy.max_excess
        if excess > accepted:
            found = (
                f"differ from answers alone in {excess:.1%} beyond the model's own noise ({accepted:.1%} are accepted)"
            )
        else:
            found = f"differ lately from answers alone in more than the {accepted:.1%} that are accepted: the model has changed"
        how = "alone" if kind.limit == 1 else f"in batches of at most {kind.limit}"
        logger.warning("answers in batches of %s %s; requests of this kind go %s", sizes_in(step), found, how)
