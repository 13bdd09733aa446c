"""The probes, each with the rule of its verdict: what is neither right nor arguable is wrong, and who waits past the limit hangs."""

from __future__ import annotations

import asyncio
import inspect
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.semantics.stage import ARGUABLE, HANG, NO_CALLER, RIGHT, SIZE, WRONG, Backend, End, Stage, Verdict, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ITEMS = ("a", "b", "c", "d")
POSITIONS = {"first": 0, "middle": 1, "last": 3}

CLOSE_LIMIT = 3.0
"""Seconds in which a library must have closed: async-batcher looks up from its queue once a second."""


class Probe(NamedTuple):
    name: str
    rule: str
    run: Callable[[Stage], Verdict]


PROBES: list[Probe] = []


def probe(name: str, rule: str, **cases: Any) -> Callable[[Any], Any]:
    """Register a function as a probe, or for each of *cases* as one that is given the case's value."""

    def register(act: Any) -> Any:
        for word, value in cases.items() or [("", ...)]:
            words = () if value is ... else (value,)

            def run(stage: Stage, words: tuple[Any, ...] = words) -> Verdict:
                if not inspect.iscoroutinefunction(act):
                    return act(stage, *words)
                with stage.loop() as runner:
                    return runner.run(act(stage, *words))

            PROBES.append(Probe(name.format(word), rule, run))
        return act

    return register


# -- cancelled callers


@probe(
    "cancel {}, queued",
    "right: the item is not sent and the others are answered; arguable: sent needlessly",
    **POSITIONS,
)
async def before_flush(stage: Stage, victim: int) -> Verdict:
    backend = Backend()
    tasks = stage.ask(await stage.open(backend), *ITEMS)
    await asyncio.sleep(0)  # all have asked; not even those that wait for one turn of the loop have sent
    if backend.calls:
        return Verdict(WRONG, "too late", "the batch left before a caller could be cancelled")
    tasks[victim].cancel()
    ends = await stage.ends(tasks, ITEMS)
    sent = ITEMS[victim] in backend.asked
    return harm(ends, victim) or Verdict(ARGUABLE if sent else RIGHT, "sent" if sent else "dropped", words_of(ends))


_SPARED = "right: the others are answered by the same call, and the cancelled one ends as cancelled"


@probe(
    "cancel {}, in flight",
    f"the caller in whose task the call runs; {_SPARED}, or it runs in a task of its own",
    runner=None,
)
@probe("cancel {}, in flight", _SPARED, **POSITIONS)
async def in_flight(stage: Stage, victim: int | None) -> Verdict:
    backend = Backend()
    tasks = stage.ask(await stage.open(backend), *ITEMS)
    await asyncio.wait_for(backend.started.wait(), stage.limit)
    if victim is None:
        if backend.tasks[0] not in tasks:
            return Verdict(RIGHT, "own task", "the call runs in a task of its own")
        victim = tasks.index(backend.tasks[0])
    tasks[victim].cancel()
    ends = await stage.ends(tasks, ITEMS)
    if bad := harm(ends, victim):
        return bad
    if len(backend.calls) > 1:
        return Verdict(WRONG, f"{len(backend.calls)} calls", f"{backend.calls}")
    return Verdict(RIGHT, "fine", words_of(ends))


@probe("cancel all, in flight", "right: the call is cancelled; arguable: it runs on needlessly")
async def all_in_flight(stage: Stage) -> Verdict:
    backend = Backend()
    peer = await stage.open(backend)
    tasks = stage.ask(peer, *ITEMS)
    await asyncio.wait_for(backend.started.wait(), stage.limit)
    for task in tasks:
        task.cancel()
    ends = await stage.ends(tasks, ITEMS)
    await asyncio.wait_for(backend.ended.wait(), stage.limit)
    if bad := await dead(stage, peer):
        return bad
    if number(ends, "cancelled") < len(ends):
        return Verdict(WRONG, kind_of(next(end for end in ends if end.how != "cancelled")), words_of(ends))
    return Verdict(*((RIGHT, "stopped") if backend.cancelled else (ARGUABLE, "runs on")), words_of(ends))


def harm(ends: Sequence[End], victim: int) -> Verdict | None:
    """Return the harm that the cancellation did to the others or to the victim, None if none."""
    if hanging := number(ends, "hang"):
        return Verdict(HANG, f"{hanging} hang", words_of(ends))
    if failed := len(ends) - 1 - number([end for at, end in enumerate(ends) if at != victim], "answered"):
        return Verdict(WRONG, f"{failed} fail", words_of(ends))
    if ends[victim].how != "cancelled":
        return Verdict(WRONG, kind_of(ends[victim]), words_of(ends))
    return None


# -- a backend that fails


def failure(error: type[BaseException]) -> Callable[[list[str]], list[Any]]:
    def fail(_items: list[str]) -> list[Any]:
        raise error("the backend's own")

    return fail


@probe(
    "raises CancelledError",
    "right: an error to every caller, none of whom was cancelled, and the next request is answered",
    error=asyncio.CancelledError,
)
@probe("backend raises", "right: an error to every caller, and the next request is answered", error=RuntimeError)
async def raises(stage: Stage, error: type[BaseException]) -> Verdict:
    peer = await stage.open(Backend(failure(error)))
    ends = await stage.asks(peer, *ITEMS)
    verdict = fate(ends)
    if verdict.mark != HANG and (cancelled := number(ends, "cancelled")):
        verdict = Verdict(WRONG, f"{cancelled} cancelled", words_of(ends))
    bad = await dead(stage, peer)
    return verdict if not bad or verdict.mark == HANG else bad


@probe("exception object", "right: a fresh one for each caller; arguable: one for all")
async def objects(stage: Stage) -> Verdict:
    ends = await stage.asks(await stage.open(Backend(failure(RuntimeError))), *ITEMS)
    if number(ends, "error") < len(ends):
        return Verdict(HANG if number(ends, "hang") else WRONG, "no error", words_of(ends))
    fresh = len({id(end.value) for end in ends}) == len(ends)
    return Verdict(RIGHT if fresh else ARGUABLE, "fresh" if fresh else "shared", words_of(ends))


def skip_first(items: list[str]) -> list[str]:
    return [answer(item) for item in items[1:]]


def talk_first(items: list[str]) -> list[str]:
    return [answer("nothing"), *map(answer, items)]


_COUNT = "right: no caller gets another one's answer; a caller without one gets an error or is asked for again"


@probe("too many results", f"one is put before the first; {_COUNT}", first=talk_first)
@probe("too few results", f"the first is skipped; {_COUNT}", first=skip_first)
async def wrong_count(stage: Stage, first: Callable[[list[str]], list[str]]) -> Verdict:
    return fate(await stage.asks(await stage.open(Backend(first)), *ITEMS))


def fate(ends: Sequence[End]) -> Verdict:
    """Judge a batch that failed as a whole: a caller without an answer of its own must get an error."""
    hanging, misled, failed = (number(ends, how) for how in ("hang", "wrong answer", "error"))
    if misled:
        word = "misled, hang" if hanging else f"{misled} misled"
        return Verdict(HANG if hanging else WRONG, word, words_of(ends), misled)
    if hanging:
        return Verdict(HANG, f"{hanging} hang", words_of(ends))
    return Verdict(RIGHT, f"{failed} errors" if failed else "answered", words_of(ends))


def fail_second(items: list[str]) -> list[Any]:
    return [ValueError("this item's own") if item == ITEMS[1] else answer(item) for item in items]


@probe("one item fails", "right: its caller gets an error, the others their answers")
async def one_item_fails(stage: Stage) -> Verdict:
    ends = await stage.asks(await stage.open(Backend(fail_second), variant="failing_items"), *ITEMS)
    if number(ends, "hang"):
        return Verdict(HANG, "hang", words_of(ends))
    if number([*ends[:1], *ends[2:]], "answered") < len(ends) - 1:
        return Verdict(WRONG, "all fail", words_of(ends))
    as_answer = ends[1].how == "wrong answer"
    return Verdict(WRONG if as_answer else RIGHT, "as answer" if as_answer else "its own", words_of(ends))


async def dead(stage: Stage, peer: Any) -> Verdict | None:
    """Return how a later request failed, None if it was answered."""
    (later,) = await stage.asks(peer, "later")
    if later.how == "answered":
        return None
    return Verdict(HANG if later.how == "hang" else WRONG, "dead", f"a later request: {later}")


# -- borders


@probe("close with pending", "right: answers or errors to all that is pending; arguable: no way to close")
async def close(stage: Stage) -> Verdict:
    if not stage.kind.closes:
        return Verdict(ARGUABLE, "no close")
    peer = await stage.open(Backend())
    tasks = stage.ask(peer, *ITEMS)
    await asyncio.sleep(0)
    try:
        await asyncio.wait_for(peer.stop(), CLOSE_LIMIT)
    except TimeoutError:
        return Verdict(HANG, "close hangs", words_of(await stage.ends(tasks, ITEMS)))
    ends = await stage.ends(tasks, ITEMS)
    if number(ends, "hang"):
        return Verdict(HANG, "callers hang", words_of(ends))
    if number(ends, "answered") == len(ends):
        return Verdict(RIGHT, "answered", words_of(ends))
    settled = number(ends, "answered") + number(ends, "error") == len(ends)
    return Verdict(RIGHT if settled else WRONG, "error" if settled else "cancelled", words_of(ends))


@probe("second event loop", "right: works, or an error at once; and the first loop goes on")
def second_loop(stage: Stage) -> Verdict:
    with stage.loop() as first, stage.loop() as second:
        peer = first.run(stage.open(Backend()))
        (before,) = first.run(stage.asks(peer, "before"))
        (there,) = second.run(stage.asks(peer, "there"))
        (after,) = first.run(stage.asks(peer, "after"))
    detail = f"first loop {before}; second {there}; first again {after}"
    if there.how == "hang":
        return Verdict(HANG, "hang", detail)
    if after.how != "answered":
        return Verdict(HANG if after.how == "hang" else WRONG, "first breaks", detail)
    if there.how == "answered":
        return Verdict(RIGHT, "works", detail)
    return Verdict(RIGHT if there.how == "error" else WRONG, kind_of(there), detail)


@probe(
    "contextvars seen",
    "right: no caller's; arguable: those of a caller in the batch; wrong: those of an earlier request",
)
async def contexts(stage: Stage) -> Verdict:
    backend = Backend()
    peer = await stage.open(backend)
    ends = await stage.asks(peer, *ITEMS) + await stage.asks(peer, "e", "f")
    detail = f"the calls saw {', '.join(backend.callers)}"
    if number(ends, "answered") < len(ends):
        return Verdict(WRONG, "not answered", words_of(ends))
    if set(backend.callers) == {NO_CALLER}:
        return Verdict(RIGHT, "none", detail)
    stale = any(caller not in (*items, NO_CALLER) for caller, items in zip(backend.callers, backend.calls, strict=True))
    return Verdict(WRONG, "stale", detail) if stale else Verdict(ARGUABLE, "a caller's", detail)


# -- what is sent


@probe("equal ones, sharing off", "right: each is asked", shared=False)
@probe("equal ones, sharing on", "right: sent once; arguable: no such setting", shared=True)
async def duplicates(stage: Stage, shared: bool) -> Verdict:
    backend = Backend()
    ends = await stage.asks(await stage.open(backend, variant="sharing" if shared else None), "a", "a", "b")
    if number(ends, "answered") < len(ends):
        return Verdict(WRONG, "not answered", words_of(ends))
    once = backend.asked.count("a") == 1
    return Verdict(RIGHT if once == shared else ARGUABLE, "sent once" if once else "sent twice", f"{backend.calls}")


ARRIVALS, EVERY, BUSY, WINDOW = 300, 0.001, 0.1, 0.005
FILL_LIMIT = 8.0
"""Seconds; 300 items at one call each 5 ms, one call at a time, take 6."""

IDEAL = 1 + math.ceil((ARRIVALS - 1) / SIZE)
"""One call that the first arrival starts, and full ones from then on."""


@probe(
    "fill while busy",
    f"right: at most 1.5 times the {IDEAL} calls that would do; arguable: at most one for two items",
)
async def fill(stage: Stage) -> Verdict:
    backend = Backend(work=BUSY)
    peer = await stage.open(backend, variant="one_call", wait=WINDOW)
    items = [f"{at}" for at in range(ARRIVALS)]
    loop = asyncio.get_running_loop()
    start, tasks = loop.time(), []
    for at, item in enumerate(items):
        await asyncio.sleep(max(0.0, start + at * EVERY - loop.time()))
        tasks += stage.ask(peer, item)
    ends = await stage.ends(tasks, items, FILL_LIMIT)
    calls = len(backend.calls)
    detail = f"{calls} calls of {', '.join(str(len(call)) for call in backend.calls[:40])}..."
    if unanswered := len(ends) - number(ends, "answered"):
        return Verdict(HANG, f"{unanswered} hang", detail)
    mark = RIGHT if calls <= 1.5 * IDEAL else ARGUABLE if calls <= ARRIVALS / 2 else WRONG
    return Verdict(mark, f"{calls} calls", detail)


# -- words


def number(ends: Sequence[End], how: str) -> int:
    return sum(end.how == how for end in ends)


def kind_of(end: End) -> str:
    return type(end.value).__name__ if end.how == "error" else end.how


def words_of(ends: Sequence[End]) -> str:
    return "; ".join(map(str, ends))
