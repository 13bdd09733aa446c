"""The probes, each with the rule by which its verdicts are given."""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.semantics.backend import NOBODY, Backend, answer
from bench.semantics.stage import SIZE, End, Stage
from bench.semantics.verdict import ARGUABLE, HANG, RIGHT, WRONG, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

ITEMS = ("a", "b", "c", "d")
POSITIONS = {"first": 0, "middle": 1, "last": 3}

CLOSE_LIMIT = 3.0
"""Seconds in which a library must have closed: async-batcher looks up from its queue once a second."""


class Probe(NamedTuple):
    """One question to a library.

    Attributes:
        name: What is done to it.
        rule: What is right, what is arguable; the rest is wrong, and a caller who waits past the limit hangs.
        run: Asks it.
    """

    name: str
    rule: str
    run: Callable[[Stage], Verdict]


# -- cancelled callers


async def before_flush(stage: Stage, victim: int) -> Verdict:
    backend = Backend()
    tasks = stage.ask(await stage.open(backend), *ITEMS)
    await asyncio.sleep(0)  # all have asked; not even those that wait for one turn of the loop have sent
    if backend.calls:
        return Verdict(WRONG, "too late", "the batch left before anybody could be cancelled")
    tasks[victim].cancel()
    ends = await stage.ends(tasks, ITEMS)
    sent = ITEMS[victim] in backend.asked
    return harm(ends, victim) or Verdict(ARGUABLE if sent else RIGHT, "sent" if sent else "dropped", told(ends))


async def in_flight(stage: Stage, victim: int | None) -> Verdict:
    """Cancel the caller at *victim*; None for the one in whose task the library runs the call."""
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
    return Verdict(RIGHT, "fine", told(ends))


def harm(ends: Sequence[End], victim: int) -> Verdict | None:
    """Return what the victim's leaving did to the others or to itself, None if no harm."""
    others = [end for at, end in enumerate(ends) if at != victim]
    if hanging := sum(end.how == "hang" for end in ends):
        return Verdict(HANG, f"{hanging} hang", told(ends))
    if failed := [end for end in others if end.how != "answered"]:
        return Verdict(WRONG, f"{len(failed)} fail", told(ends))
    if ends[victim].how != "cancelled":
        return Verdict(WRONG, kind_of(ends[victim]), told(ends))
    return None


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
    if any(end.how != "cancelled" for end in ends):
        return Verdict(WRONG, f"{kind_of(next(end for end in ends if end.how != 'cancelled'))}", told(ends))
    if backend.cancelled:
        return Verdict(RIGHT, "stopped", told(ends))
    return Verdict(ARGUABLE, "runs on", told(ends))


# -- a backend that fails


def failure(error: type[BaseException]) -> Callable[[list[str]], list[Any]]:
    def fail(_items: list[str]) -> list[Any]:
        raise error("the backend's own")

    return fail


async def raises(stage: Stage, error: type[BaseException]) -> Verdict:
    backend = Backend(failure(error))
    peer = await stage.open(backend)
    ends = await stage.asks(peer, *ITEMS)
    if hanging := sum(end.how == "hang" for end in ends):
        verdict = Verdict(HANG, f"{hanging} hang", told(ends))
    elif cancelled := sum(end.how == "cancelled" for end in ends):
        verdict = Verdict(WRONG, f"{cancelled} cancelled", told(ends))
    else:
        verdict = fate(ends)
    bad = await dead(stage, peer)
    if bad and verdict.mark == HANG:
        return Verdict(HANG, "hang, dead", f"{verdict.detail}; afterwards {bad.detail}")
    return bad or verdict


async def objects(stage: Stage) -> Verdict:
    ends = await stage.asks(await stage.open(Backend(failure(RuntimeError))), *ITEMS)
    if any(end.how != "error" for end in ends):
        return Verdict(HANG if any(end.how == "hang" for end in ends) else WRONG, "no error", told(ends))
    fresh = len({id(end.value) for end in ends}) == len(ends)
    return Verdict(RIGHT if fresh else ARGUABLE, "fresh" if fresh else "shared", told(ends))


def skip_first(items: list[str]) -> list[str]:
    return [answer(item) for item in items[1:]]


def talk_first(items: list[str]) -> list[str]:
    return [answer("nothing"), *map(answer, items)]


async def wrong_count(stage: Stage, first: Callable[[list[str]], list[str]]) -> Verdict:
    return fate(await stage.asks(await stage.open(Backend(first)), *ITEMS))


def fate(ends: Sequence[End]) -> Verdict:
    """Judge a batch that went wrong as a whole: whoever has no answer of their own must be told."""
    hanging, misled, failed = (sum(end.how == how for end in ends) for how in ("hang", "wrong answer", "error"))
    if misled:
        word = "misled, hang" if hanging else f"{misled} misled"
        return Verdict(HANG if hanging else WRONG, word, told(ends), misled=misled)
    if hanging:
        return Verdict(HANG, f"{hanging} hang", told(ends))
    return Verdict(RIGHT, f"{failed} errors" if failed else "answered", told(ends))


def fail_second(items: list[str]) -> list[Any]:
    return [ValueError("this item's own") if item == ITEMS[1] else answer(item) for item in items]


async def one_item_fails(stage: Stage) -> Verdict:
    ends = await stage.asks(await stage.open(Backend(fail_second), variant="failing_items"), *ITEMS)
    unlucky, others = ends[1], [*ends[:1], *ends[2:]]
    if any(end.how == "hang" for end in ends):
        return Verdict(HANG, "hang", told(ends))
    if any(end.how != "answered" for end in others):
        return Verdict(WRONG, "all fail", told(ends))
    if unlucky.how == "wrong answer":
        return Verdict(WRONG, "as answer", told(ends))
    return Verdict(RIGHT, "its own", told(ends))


async def dead(stage: Stage, peer: Any) -> Verdict | None:
    """Return how a request fares that comes after the trouble, None if well."""
    (later,) = await stage.asks(peer, "later")
    if later.how == "answered":
        return None
    return Verdict(HANG if later.how == "hang" else WRONG, "dead", f"a later request: {later}")


# -- borders


async def close(stage: Stage) -> Verdict:
    if not stage.kind.closes:
        return Verdict(ARGUABLE, "no close")
    peer = await stage.open(Backend())
    tasks = stage.ask(peer, *ITEMS)
    await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    start = loop.time()
    try:
        await asyncio.wait_for(peer.stop(), CLOSE_LIMIT)
    except TimeoutError:
        return Verdict(HANG, "close hangs", told(await stage.ends(tasks, ITEMS)))
    took = f"closed in {loop.time() - start:.2f} s; "
    ends = await stage.ends(tasks, ITEMS)
    if any(end.how == "hang" for end in ends):
        return Verdict(HANG, "callers hang", took + told(ends))
    if all(end.how == "answered" for end in ends):
        return Verdict(RIGHT, "answered", took + told(ends))
    told_so = all(end.how in ("answered", "error") for end in ends)
    return Verdict(RIGHT if told_so else WRONG, "error" if told_so else "cancelled", took + told(ends))


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


async def contexts(stage: Stage) -> Verdict:
    backend = Backend()
    peer = await stage.open(backend)
    early = await stage.asks(peer, *ITEMS)
    ends = early + await stage.asks(peer, "e", "f")
    detail = f"the calls saw {', '.join(backend.callers)}"
    if any(end.how != "answered" for end in ends):
        return Verdict(WRONG, "not answered", told(ends))
    if set(backend.callers) == {NOBODY}:
        return Verdict(RIGHT, "nobody's", detail)
    stale = any(caller not in (*items, NOBODY) for caller, items in zip(backend.callers, backend.calls, strict=True))
    return Verdict(WRONG, "stale", detail) if stale else Verdict(ARGUABLE, "a caller's", detail)


# -- what is sent


async def duplicates(stage: Stage, *, shared: bool) -> Verdict:
    items = ("a", "a", "b")
    backend = Backend()
    ends = await stage.asks(await stage.open(backend, variant="sharing" if shared else None), *items)
    if any(end.how != "answered" for end in ends):
        return Verdict(WRONG, "not answered", told(ends))
    once = backend.asked.count("a") == 1
    return Verdict(RIGHT if once == shared else ARGUABLE, "sent once" if once else "sent twice", f"{backend.calls}")


ARRIVALS = 300
EVERY = 0.001
BUSY = 0.1
WINDOW = 0.005
FILL_LIMIT = 8.0
"""Seconds; 300 items at one call each 5 ms, one call at a time, take 6."""

IDEAL = 1 + math.ceil((ARRIVALS - 1) / SIZE)
"""One call that the first arrival starts, and full ones from then on."""


async def fill(stage: Stage) -> Verdict:
    backend = Backend(work=BUSY)
    peer = await stage.open(backend, variant="one_call", wait=WINDOW)
    items = [f"{number}" for number in range(ARRIVALS)]
    loop = asyncio.get_running_loop()
    start = loop.time()
    tasks = []
    for number, item in enumerate(items):
        await asyncio.sleep(max(0.0, start + number * EVERY - loop.time()))
        tasks += stage.ask(peer, item)
    ends = await stage.ends(tasks, items, FILL_LIMIT)
    calls = len(backend.calls)
    detail = (
        f"{calls} calls of {', '.join(str(len(call)) for call in backend.calls[:40])}... in {loop.time() - start:.2f} s"
    )
    if unanswered := sum(end.how != "answered" for end in ends):
        return Verdict(HANG, f"{unanswered} hang", detail)
    mark = RIGHT if calls <= 1.5 * IDEAL else ARGUABLE if calls <= ARRIVALS / 2 else WRONG
    return Verdict(mark, f"{calls} calls", detail)


# -- words


def kind_of(end: End) -> str:
    return type(end.value).__name__ if end.how == "error" else end.how


def told(ends: Sequence[End]) -> str:
    return "; ".join(map(str, ends))


def alone(act: Callable[[Stage], Coroutine[Any, Any, Verdict]]) -> Callable[[Stage], Verdict]:
    """Let *act* run in a loop of its own."""

    def run(stage: Stage) -> Verdict:
        with stage.loop() as runner:
            return runner.run(act(stage))

    return run


_DROPPED = "right: the item is not sent and the others are answered; arguable: sent for nobody"
_SPARED = "right: the others are answered by the same call, and the cancelled one ends as cancelled"
_COUNT = "right: nobody gets another one's answer; whoever has none gets an error or is asked for again"

PROBES = (
    *(
        Probe(f"cancel {name}, queued", _DROPPED, alone(partial(before_flush, victim=at)))
        for name, at in POSITIONS.items()
    ),
    *(
        Probe(f"cancel {name}, in flight", _SPARED, alone(partial(in_flight, victim=at)))
        for name, at in POSITIONS.items()
    ),
    Probe(
        "cancel runner, in flight",
        f"the caller in whose task the call runs; {_SPARED}, or it runs in a task of its own",
        alone(partial(in_flight, victim=None)),
    ),
    Probe(
        "cancel all, in flight", "right: the call is cancelled; arguable: it runs on for nobody", alone(all_in_flight)
    ),
    Probe(
        "backend raises",
        "right: an error to every caller, and the next request is answered",
        alone(partial(raises, error=RuntimeError)),
    ),
    Probe(
        "raises CancelledError",
        "right: an error to every caller, whom nobody cancelled, and the next request is answered",
        alone(partial(raises, error=asyncio.CancelledError)),
    ),
    Probe("exception object", "right: a fresh one for each caller; arguable: one for all", alone(objects)),
    Probe("too few results", f"the first is skipped; {_COUNT}", alone(partial(wrong_count, first=skip_first))),
    Probe("too many results", f"one is put before the first; {_COUNT}", alone(partial(wrong_count, first=talk_first))),
    Probe("one item fails", "right: its caller gets an error, the others their answers", alone(one_item_fails)),
    Probe(
        "close with pending", "right: answers or errors to all that is pending; arguable: no way to close", alone(close)
    ),
    Probe("second event loop", "right: works, or an error at once; and the first loop goes on", second_loop),
    Probe(
        "contextvars seen",
        "right: no caller's; arguable: those of a caller in the batch; wrong: those of an earlier request",
        alone(contexts),
    ),
    Probe(
        "equal ones, sharing on",
        "right: sent once; arguable: no such setting",
        alone(partial(duplicates, shared=True)),
    ),
    Probe("equal ones, sharing off", "right: each is asked", alone(partial(duplicates, shared=False))),
    Probe(
        "fill while busy",
        f"right: at most 1.5 times the {IDEAL} calls that would do; arguable: at most one for two items",
        alone(fill),
    ),
)
