"""What several test files need."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import time
from contextlib import asynccontextmanager, contextmanager

import microbatch as mb
from microbatch.batching.scheduler import Scheduler
from microbatch.testing import SimulatedEndpoint

TRIES = 10
PATIENCE = 40.0
"""Seconds after which what a test waits for will not come, however loaded the machine is."""

_BATCHER_OPTIONS = inspect.signature(mb.Microbatcher).parameters


def each(names, cases):
    """Run a test for each of *cases* in turn: `pytest.mark.parametrize` as one test, for many cases of a moment each."""
    words = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    cases = list(cases)

    def decorate(test):
        @contextmanager
        def arguments(case):
            given = dict(zip(words, case if len(words) > 1 else (case,), strict=True))
            try:
                yield given
            except BaseException as error:
                error.add_note(f"with {given}")
                raise

        if inspect.iscoroutinefunction(test):

            async def wrapper(**others):
                for case in cases:
                    with arguments(case) as given:
                        await test(**others, **given)
        else:

            def wrapper(**others):
                for case in cases:
                    with arguments(case) as given:
                        test(**others, **given)

        signature = inspect.signature(test)
        functools.update_wrapper(wrapper, test)
        del wrapper.__wrapped__  # pytest would look through it
        left = [parameter for name, parameter in signature.parameters.items() if name not in words]
        wrapper.__signature__ = signature.replace(parameters=left)
        return wrapper

    return decorate


async def in_time(what, most):
    """Await *what* anew until it takes less than *most* seconds; return that time.

    A loaded machine is late now and then, and what is too slow by itself is so each time.
    """
    for _ in range(TRIES):
        begun = time.perf_counter()
        await what()
        took = time.perf_counter() - begun
        if took < most:
            return took
    raise AssertionError(f"{TRIES} times it took longer than {most:g} s, at last {took:g} s")


async def until(condition):
    """Look at *condition* until it holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 other processes and connections set no event
            await asyncio.sleep(0.005)


def now():
    """Return the time of the running loop, in seconds."""
    return asyncio.get_running_loop().time()


def ask(text, system="Shout."):
    """Return messages with a shared instruction and one text of their own."""
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def chat_call(text="Hi.", **fields):
    """Return a call with one user message."""
    return mb.ChatCall(**{"messages": [{"role": "user", "content": text}], **fields})


def batcher_for(transport, cache=None, **options):
    """Return a batcher that counts bytes, so that no test waits for a token table.

    The options are those of `Microbatcher` and of `FlushPolicy`.
    """
    own = {name: options.pop(name) for name in _BATCHER_OPTIONS if name in options}
    return mb.Microbatcher(transport, **{"policy": mb.FlushPolicy(**options), "cache": cache, "tokens": "bytes", **own})


async def submit_all(batcher, texts, **options):
    """Submit all texts at once, and return the replies."""
    return await asyncio.gather(*(batcher.submit(ask(text), **options) for text in texts))


@asynccontextmanager
async def opened(part):
    """Open a cache or a spool, if it can be opened, and close it in the end."""
    if hasattr(part, "open"):
        await part.open()
    try:
        yield part
    finally:
        await part.aclose()


class Tasks:
    """As much of a task group as a scheduler needs."""

    def start_soon(self, function, *args):
        self.last = asyncio.ensure_future(function(*args))


def scheduler_for(account, slots=64, *, begin=None):
    """Return a running scheduler for *account*; what it takes from a queue is left to the test."""

    async def do(work):
        pass

    scheduler = Scheduler(slots)
    scheduler.start(Tasks(), begin, do)
    account.slots = scheduler
    return scheduler


@contextmanager
def serving(kind=SimulatedEndpoint, **options):
    """Serve a simulated endpoint from a thread of its own, and yield it."""
    started, stop = threading.Event(), asyncio.Event()
    endpoint, loops = kind(**options), []

    async def serve():
        async with endpoint:
            loops.append(asyncio.get_running_loop())
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(10)
    try:
        yield endpoint
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(10)
