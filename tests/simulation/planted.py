"""Bugs to plant in the library for a while, to see that the simulation finds them: those that batchers like this one had.

Each is a context manager that bends the library from outside, at a seam that is documented: the transport, the methods of
`Microbatcher`, the event loop, the codec (`ending`, `check_canary`, `Demultiplexer`), the queues (`AdmissionQueue`, `Lane`,
`FairQueue`, `Scheduler`) and the budget (`Spending`). The library itself has no switches.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import defaultdict, deque
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
from simulation.loop import ShuffledLoop
from simulation.scenario import TICK
from simulation.upstream import Upstream

import microbatch as mb
from microbatch.batching import admission
from microbatch.batching.admission import AdmissionQueue
from microbatch.batching.fair_queue import FairQueue
from microbatch.batching.lane import Lane
from microbatch.batching.scheduler import Scheduler
from microbatch.prompt.compose import check_canary
from microbatch.prompt.demultiplexer import Demultiplexer
from microbatch.prompt.outcome import ending
from microbatch.spending.spending import Spending
from microbatch.testing import ScriptedCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by what *make* makes of it."""
    inherited, old = name not in vars(owner), getattr(owner, name)
    setattr(owner, name, make(old))
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, old)


@contextmanager
def _replaced_everywhere(function: Any, make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace a function of the library in every module that has imported it."""
    with ExitStack() as undo:
        for module in [module for name, module in sys.modules.items() if name.startswith("microbatch.")]:
            for name in [name for name, value in vars(module).items() if value is function]:
                undo.enter_context(replaced(module, name, make))
        yield


@contextmanager
def all_of(*bugs: Any) -> Iterator[None]:
    with ExitStack() as undo:
        for bug in bugs:
            undo.enter_context(bug)
        yield


# --- the transport


def first_caller_runs_the_batch():
    """The batch runs in its first caller's task, whose cancel it dies of."""
    running: dict[str, asyncio.Task[Any]] = {}

    def run_in_first(send):
        async def wrapper(upstream, call, on_text):
            first = ScriptedCall(call, 0.0).items[0][1]
            running[first] = asyncio.current_task()
            try:
                return await send(upstream, call, on_text)
            finally:
                running.pop(first, None)

        return wrapper

    def die(submit):
        async def wrapper(batcher, messages, **options):
            try:
                return await submit(batcher, messages, **options)
            except asyncio.CancelledError:
                if (task := running.get(messages[-1]["content"])) is not None:
                    task.cancel()
                raise

        return wrapper

    return all_of(replaced(Upstream, "send", run_in_first), replaced(mb.Microbatcher, "submit", die))


def orphaned_call():
    """A call goes on when its last caller has gone."""

    def go_on(send):
        async def wrapper(upstream, call, on_text):
            sending = asyncio.ensure_future(send(upstream, call, on_text))
            while not sending.done():
                try:
                    await asyncio.wait([sending])
                except asyncio.CancelledError:
                    continue
            return sending.result()

        return wrapper

    return replaced(Upstream, "send", go_on)


def hasty_retries():
    """What the endpoint asks to wait is not heeded."""

    def deaf(send):
        async def wrapper(upstream, call, on_text):
            try:
                return await send(upstream, call, on_text)
            except mb.StatusError as error:
                error.retry_after = None
                raise

        return wrapper

    return replaced(Upstream, "send", deaf)


@contextmanager
def _marked(kinds: Any) -> Iterator[set[Any]]:
    """Yield a set of the tasks whose latest attempt ended with one of these exceptions."""
    marked: set[Any] = set()

    def mark(send):
        async def wrapper(upstream, call, on_text):
            try:
                return await send(upstream, call, on_text)
            except kinds:
                marked.add(asyncio.current_task())
                raise

        return wrapper

    with replaced(Upstream, "send", mark):
        yield marked


@contextmanager
def leaked_slot():
    """A call that nobody waits for any more keeps its slot."""
    with _marked(asyncio.CancelledError) as cancelled:

        def leak(released):
            def wrapper(scheduler, permit):
                task = asyncio.current_task()
                scheduler.in_use += permit.slot and task in cancelled
                cancelled.discard(task)
                released(scheduler, permit)

            return wrapper

        with replaced(Scheduler, "released", leak):
            yield


@contextmanager
def slot_kept_through_back_off():
    """A call that backs off keeps its slot until its next attempt, or its end."""
    with _marked(mb.TransportError) as failed:

        def keep(released):
            def wrapper(scheduler, permit):
                task = asyncio.current_task()
                if task not in failed:
                    released(scheduler, permit)
                failed.discard(task)

            return wrapper

        with replaced(Scheduler, "released", keep):
            yield


# --- the client


def _with_options(**changes: Callable[[Any], Any]) -> Any:
    """Change options that a batcher is made with."""

    def changed(init):
        def wrapper(batcher, transport, **options):
            init(batcher, transport, **{**options, **{name: change(options[name]) for name, change in changes.items()}})

        return wrapper

    return replaced(mb.Microbatcher, "__init__", changed)


def ignored_limit():
    """There is always a permit."""
    return _with_options(rate_limit=lambda _: None)


def unbounded_retries():
    """Retries draw on no budget."""
    return _with_options(retry=lambda retry: replace(retry, reserve=1_000_000))


def unfinished_close():
    """Closing does not wait for the calls under way."""
    return replaced(
        mb.Microbatcher,
        "aclose",
        lambda aclose: lambda batcher, grace=30.0: aclose(batcher, None if grace is None else 0.0),
    )


def ignored_tenant():
    """Lanes are not told apart by their tenants."""
    return replaced(
        mb.Microbatcher,
        "submit",
        lambda submit: lambda batcher, messages, **options: submit(batcher, messages, **{**options, "tenant": None}),
    )


def lost_usage():
    """What a cancelled request's calls cost is forgotten."""
    return replaced(
        mb.Microbatcher,
        "stats",
        lambda stats: lambda batcher: msgspec.structs.replace(stats(batcher), unclaimed=mb.Usage()),
    )


# --- the event loop


class _Unchecked(asyncio.Future):
    """A future of which nobody asks whether it was cancelled."""

    def done(self):
        return super().done() and not self.cancelled()


def missing_done_check():
    """An answer is set on a future without looking whether its caller has gone."""

    def unchecked(create_future):
        def wrapper(loop):
            ours = sys._getframe(1).f_globals["__name__"].startswith("microbatch.batching")
            return _Unchecked(loop=loop) if ours else create_future(loop)

        return wrapper

    return replaced(ShuffledLoop, "create_future", unchecked)


class _Stale:
    """The handle of a timer that cannot be cancelled."""

    def cancel(self):
        pass


def stale_timer():
    """A lane that has left keeps its timer, which flushes the next batch too early."""

    def keep(call_at):
        def wrapper(loop, when, callback, *args, **options):
            timer = call_at(loop, when, callback, *args, **options)
            return _Stale() if args and isinstance(args[0], Lane) else timer

        return wrapper

    return replaced(ShuffledLoop, "call_at", keep)


def late_deadline():
    """A deadline is looked at some time after it has passed."""

    def later(call_at):
        def wrapper(loop, when, callback, *args, **options):
            late = TICK if "expire" in getattr(callback, "__qualname__", "") else 0.0
            return call_at(loop, when + late, callback, *args, **options)

        return wrapper

    return replaced(ShuffledLoop, "call_at", later)


# --- the codec


def positional_matching():
    """Answers are matched by position, not by id: the nth id of a reply is taken for the nth that was asked for."""
    asked: dict[int, Iterator[str]] = {}
    held: dict[int, str] = defaultdict(str)

    def renamed(demultiplexer, text):
        ids = asked[id(demultiplexer)]
        return re.sub(
            r'"id":"([^"]*)"', lambda found: json.dumps({"id": next(ids, found[1])}, separators=(",", ":"))[1:-1], text
        )

    def noted(init):
        def wrapper(demultiplexer, ids, *args, **options):
            asked[id(demultiplexer)], held[id(demultiplexer)] = iter(list(ids)), ""
            init(demultiplexer, ids, *args, **options)

        return wrapper

    def feed_renamed(feed):
        def wrapper(demultiplexer, text):
            whole, brace, rest = (held[id(demultiplexer)] + text).rpartition("}")
            held[id(demultiplexer)] = rest
            return feed(demultiplexer, renamed(demultiplexer, whole + brace))

        return wrapper

    def close_renamed(close):
        def wrapper(demultiplexer, **options):
            rest = renamed(demultiplexer, held.pop(id(demultiplexer), ""))
            return [
                *(Demultiplexer.feed.__wrapped__(demultiplexer, rest) if rest else []),
                *close(demultiplexer, **options),
            ]

        return wrapper

    def wrapped(feed):
        wrapper = feed_renamed(feed)
        wrapper.__wrapped__ = feed
        return wrapper

    return all_of(
        replaced(Demultiplexer, "__init__", noted),
        replaced(Demultiplexer, "feed", wrapped),
        replaced(Demultiplexer, "close", close_renamed),
    )


def no_bisection():
    """A refused batch fails as a whole."""

    def blame_all(ending):
        def wrapper(completion, error, **known):
            how = ending(completion, error, **known)
            return "failed" if how == "refused" and error is not None else how

        return wrapper

    return _replaced_everywhere(ending, blame_all)


def trusted_hijack():
    """The canary's answer is not looked at."""
    return _replaced_everywhere(check_canary, lambda _: lambda word, raw: None)


# --- the queues


def _places_kept(when: Callable[[BaseException], bool]) -> Any:
    """Let places stay occupied that are released because of an exception for which *when* holds."""

    def keep(release):
        def wrapper(queue, count=1):
            error = sys.exc_info()[1]
            if error is None or not when(error):
                release(queue, count)

        return wrapper

    return replaced(AdmissionQueue, "release", keep)


def leaked_room():
    """A request whose caller leaves keeps its place."""
    return _places_kept(lambda error: isinstance(error, asyncio.CancelledError))


def place_not_passed_on():
    """A caller that is let in and then misuses the library takes its place with it."""
    return _places_kept(lambda error: not isinstance(error, asyncio.CancelledError))


class _Stack(deque):
    """A queue whose last comes first."""

    def popleft(self):
        return self.pop()


def newest_first():
    """A place is given to the caller that came last."""
    return replaced(admission, "deque", lambda _: _Stack)


def dropping_on_close():
    """What waits when the batcher closes is dropped without a word."""
    return replaced(Lane, "waiting", lambda _: lambda lane: [])


def lost_wakeup():
    """The end of a call does not make its lane due, although requests wait in it."""

    def forget(flush):
        def wrapper(lane, reason, **options):
            if reason != "idle" or lane.live == 1:
                flush(lane, reason, **options)

        return wrapper

    return replaced(Lane, "schedule_flush", forget)


def await_inside_flush():
    """Between looking for a free slot and taking it, the scheduler waits a turn for something."""
    looked: dict[int, tuple[int, int]] = {}

    def stale(following):
        def wrapper(turns, in_use=0):
            turn = asyncio.get_running_loop().turns
            if looked.get(id(turns), (None, 0))[0] != turn:
                looked[id(turns)] = turn, in_use
            return following(turns, looked[id(turns)][1])

        return wrapper

    return replaced(FairQueue, "next", stale)


# --- the budget


def charge_kept_for_ever():
    """A call that was given up counts as under way for ever, and others wait for it."""

    def forget(keep):
        def wrapper(spending, charge):
            if not isinstance(sys.exc_info()[1], asyncio.CancelledError):
                keep(spending, charge)

        return wrapper

    return replaced(Spending, "keep", forget)


def refusal_paid():
    """A refused attempt keeps its charge."""

    def kept(_give_back):
        async def wrapper(spending, charge):
            spending.keep(charge)

        return wrapper

    return replaced(Spending, "give_back", kept)


def one_purse_for_all_tenants():
    """A tenant pays for another."""

    def shared(charge):
        async def wrapper(spending, expense):
            return await charge(spending, msgspec.structs.replace(expense, tenant=None))

        return wrapper

    return replaced(Spending, "charge", shared)


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
    charge_kept_for_ever,
    refusal_paid,
    one_purse_for_all_tenants,
)
"""The simulation finds each of the bugs that batchers like this one have had."""
