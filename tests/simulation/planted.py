"""Bugs to plant in the library for a while, to see that the simulation finds them: those that batchers like this one had.

Each is a context manager that bends the library from outside; the library itself has no switches.
"""

from __future__ import annotations

import asyncio
import functools
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from simulation.scenario import TICK

import microbatch as mb
import microbatch.batching.admission as admission_module
import microbatch.batching.dispatch as call_module
import microbatch.batching.intake as intake_module
import microbatch.prompt.outcome as outcome_module
from microbatch.batching.attribution import UsageAttribution
from microbatch.batching.call_state import CallState
from microbatch.batching.dispatch import Dispatcher
from microbatch.batching.engine import Engine
from microbatch.batching.intake import Intake
from microbatch.batching.lane_table import LaneTable
from microbatch.batching.scheduler import Scheduler
from microbatch.batching.single_flight import Settlement
from microbatch.errors import StatusError
from microbatch.transience import RetryBudget
from microbatch.transports.accounts import Account
from microbatch.transports.bucket import Bucket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by what *make* makes of it."""
    old = vars(owner)[name]
    setattr(owner, name, make(old))
    try:
        yield
    finally:
        setattr(owner, name, old)


def missing_done_check():
    """An answer is set on a future without looking whether its caller has gone."""

    def careless(answer):
        @functools.wraps(answer)
        def wrapper(calls, tickets, answers, *args):
            answers = list(answers)
            if any(tickets[index].done for index, _ in answers):
                raise asyncio.InvalidStateError("invalid state")  # what set_result would raise
            return answer(calls, tickets, answers, *args)

        return wrapper

    return _replaced(Dispatcher, "_answer", careless)


class Positional:
    """Matches the nth answer of a reply to the nth request, as most hand-written batchers do."""

    late_duplicates = unknown_ids = 0
    damaged = False

    def __init__(self, ids, decoders, *, early=True):
        self._decoders = decoders
        self._text = ""
        self._answered: set[int] = set()

    def feed(self, text):
        self._text += text
        return []

    def close(self, *, ended=True):
        try:
            elements = json.loads(self._text)["results"]
        except (ValueError, LookupError, TypeError):
            return []
        answers = []
        for index, (element, decode) in enumerate(zip(elements, self._decoders, strict=False)):
            try:
                answers.append((index, decode(json.dumps(element["answer"], separators=(",", ":")))))
            except (ValueError, LookupError, TypeError):
                continue
            self._answered.add(index)
        return answers

    def faults(self):
        for index in range(len(self._decoders)):
            if index not in self._answered:
                yield index, "missing", ""


def positional_matching():
    """Answers are matched by position, not by id."""
    return _replaced(outcome_module, "Demultiplexer", lambda _: Positional)


def stale_timer():
    """A lane that has left keeps its timer, which flushes the next batch too early."""

    def forget(_):
        def disarm(lanes, lane):
            lane.timer = None

        return disarm

    return _replaced(LaneTable, "_disarm", forget)


def dropping_on_close():
    """What waits when the batcher closes is dropped without a word."""

    def drop(end):
        def wrapper(engine):
            for lane in engine.lanes:
                lane._pending.clear()
            end(engine)

        return wrapper

    return _replaced(Engine, "_end_waiting", drop)


def no_bisection():
    """A refused batch fails as a whole."""

    def blame_all(ending):
        def wrapper(completion, error, **known):
            how = ending(completion, error, **known)
            return "failed" if how == "refused" and error is not None else how

        return wrapper

    return _replaced(call_module, "ending", blame_all)


def await_inside_flush():
    """Between looking for a free slot and taking it, the scheduler waits a turn for something."""

    def divided(grant):
        def wrapper(scheduler, permit):
            in_use = scheduler.in_use
            granted = grant(scheduler, permit)
            if granted:
                scheduler.in_use = in_use  # until the next turn: a count of tokens in a thread, say
                asyncio.get_running_loop().call_soon(take, scheduler)
            return granted

        return wrapper

    def take(scheduler):
        scheduler.in_use += 1

    return _replaced(Scheduler, "_grant", divided)


def leaked_room():
    """A request that leaves unsent keeps its place."""

    def leak(remove):
        def wrapper(settlement, ticket, waiters):
            if ticket.queue is not None:
                settlement._admission.occupy()
            remove(settlement, ticket, waiters)

        return wrapper

    return _replaced(Settlement, "_remove", leak)


def leaked_slot():
    """A call that nobody waits for any more keeps its slot."""

    def leak(settle):
        async def wrapper(engine, work):
            await settle(engine, work)
            if all(ticket.first.future.cancelled() for ticket in work.tickets):
                engine.scheduler.in_use += 1

        return wrapper

    return _replaced(Engine, "_do", leak)


def slot_kept_through_back_off():
    """A call that backs off keeps its slot."""

    def keep(released):
        def wrapper(scheduler, permit):
            if isinstance(permit.error, mb.RequestFailed) or not permit.begun or not permit.slot:
                return released(scheduler, permit)
            # Whether it failed is known a step later.
            return asyncio.get_running_loop().call_soon(later, scheduler, permit)

        def later(scheduler, permit):
            if permit.error is None or not permit.begun:
                released(scheduler, permit)

        return wrapper

    return _replaced(Scheduler, "released", keep)


def place_not_passed_on():
    """A caller that is let in and then misuses the library takes its place with it."""

    def keep(accept):
        def wrapper(intake, *args):
            try:
                return accept(intake, *args)
            except BaseException:
                intake._admission.occupy()
                raise

        return wrapper

    return _replaced(Intake, "accept", keep)


def first_caller_runs_the_batch():
    """The batch runs in its first caller's task, whose cancel it dies of."""

    def run_in_first(settle):
        async def wrapper(engine, work):
            task = asyncio.current_task()

            def die(future):
                if future.cancelled() and not task.done():
                    task.cancel()

            work.tickets[0].first.future.add_done_callback(die)
            try:
                await settle(engine, work)
            finally:
                work.tickets[0].first.future.remove_done_callback(die)

        return wrapper

    return _replaced(Engine, "_do", run_in_first)


def ignored_tenant():
    """Lanes are told apart by their messages only."""

    def loosely(read):
        def wrapper(messages, options):
            found = read(messages, options)
            return found and ((options.priority, options.content[:-1], *found[0][2:]), found[1])

        return wrapper

    return _replaced(intake_module, "read_messages", loosely)


def orphaned_call():
    """A call goes on when its last caller has gone."""
    return _replaced(CallState, "stop", lambda _: lambda call_state: None)


def lost_usage():
    """What a cancelled request's calls cost is forgotten."""

    def forget(book):
        def wrapper(attribution, tickets, call_cost):
            unclaimed = attribution._ledger.unclaimed
            book(attribution, tickets, call_cost)
            attribution._ledger.unclaimed = unclaimed

        return wrapper

    return _replaced(UsageAttribution, "_book", forget)


def late_deadline():
    """A deadline is looked at once the call is over, not when it passes."""

    def later(expire):
        def wrapper(settlement, ticket, waiter):
            if ticket.queue is not None:
                expire(settlement, ticket, waiter)
            else:
                asyncio.get_running_loop().call_later(TICK, expire, settlement, ticket, waiter)

        return wrapper

    return _replaced(Settlement, "expire", later)


def newest_first():
    """A place is given to the caller that came last."""

    def reversed_(take):
        def wrapper(line):
            for callers in line._tenants.values():
                callers.reverse()
            place = take(line)
            for callers in line._tenants.values():
                callers.reverse()
            return place

        return wrapper

    return _replaced(admission_module._Line, "take", reversed_)


def lost_wakeup():
    """The end of a call does not make its lane due, although requests wait in it."""

    def forget(call_ended):
        def wrapper(lanes, lane, *, combined):
            lane.call_ended(combined=combined)
            lanes.drop_if_abandoned(lane)

        return wrapper

    return _replaced(LaneTable, "call_ended", forget)


def unfinished_close():
    """Closing does not wait for the calls under way."""

    def hasty(close):
        def wrapper(engine, grace):
            close(engine, 0.0 if grace is not None else None)

        return wrapper

    return _replaced(Engine, "close", hasty)


def ignored_limit():
    """There is always a permit."""
    return _replaced(Bucket, "wait", lambda _: lambda bucket, tokens, now: 0.0)


def unbounded_retries():
    """Retries draw on no budget."""
    return _replaced(RetryBudget, "draw", lambda _: lambda budget: True)


def hasty_retries():
    """What the endpoint asks to wait is not heeded."""

    def deaf(ended):
        def wrapper(account, permit, error, *args):
            if isinstance(error, StatusError):
                error.retry_after = None
            ended(account, permit, error, *args)

        return wrapper

    return _replaced(Account, "ended", deaf)


def trusted_hijack():
    """The canary's answer is not looked at."""
    return _replaced(outcome_module, "check_canary", lambda _: lambda word, raw: None)


BUGS: tuple[Callable[[], Any], ...] = (
    missing_done_check,
    positional_matching,
    stale_timer,
    dropping_on_close,
    no_bisection,
    await_inside_flush,
    leaked_room,
    leaked_slot,
    slot_kept_through_back_off,
    place_not_passed_on,
    first_caller_runs_the_batch,
    ignored_tenant,
    orphaned_call,
    lost_usage,
    late_deadline,
    newest_first,
    lost_wakeup,
    unfinished_close,
    ignored_limit,
    unbounded_retries,
    hasty_retries,
    trusted_hijack,
)
