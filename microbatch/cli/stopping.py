"""Ctrl-C and SIGTERM end a command in order, and SIGHUP lets a server read its files again."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from typing import TYPE_CHECKING, Final, NamedTuple

from microbatch.cli.console import UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_unsupported = contextlib.suppress(NotImplementedError, ValueError, RuntimeError)


@contextlib.contextmanager
def stoppable(*first: Callable[[], None]) -> Generator[Callable[[], None]]:
    """Call one of *first* at each signal; at the next one leave this block, without an error. A further one has its usual effect.

    Yield a function that leaves the block in the same way: it cancels the running task.
    """
    task = asyncio.current_task()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if not stopped and task is not None:
            stopped = True
            task.cancel()

    try:
        with at_signals(*first, stop):
            yield stop
    except asyncio.CancelledError:
        if not stopped or task is None:
            raise
        task.uncancel()


@contextlib.contextmanager
def at_signals(*actions: Callable[[], None]) -> Generator[None]:
    """Call one of *actions* at each signal, in order; once all are used up, a signal has its usual effect.

    Outside the main thread, or without support for signals, the block runs unchanged.
    """
    loop = asyncio.get_running_loop()
    left = list(actions)

    def act() -> None:
        action = left.pop(0)
        if not left:
            usual()
        action()

    def usual() -> None:
        with _unsupported:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    with _unsupported:
        for number in _SIGNALS:
            loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        usual()


@contextlib.contextmanager
def at_hangup(reload: Callable[[], Awaitable[None]], stop: Callable[[], object]) -> Generator[asyncio.Event]:
    """Call *reload* after each SIGHUP, once at a time; if the signal says that the terminal of the process is gone, call *stop*.

    Yield an event before which *reload* is not called.
    """
    loop = asyncio.get_running_loop()
    terminals = [number for number in range(3) if os.isatty(number)]
    begun, wanted = asyncio.Event(), asyncio.Event()

    def act() -> None:
        if terminals and not any(map(os.isatty, terminals)):
            stop()
        else:
            wanted.set()

    async def reload_when_wanted() -> None:
        await begun.wait()
        while await wanted.wait():
            wanted.clear()
            await reload()

    with _unsupported:
        loop.add_signal_handler(signal.SIGHUP, act)
    task = loop.create_task(reload_when_wanted())
    try:
        yield begun
    finally:
        task.cancel()
        with _unsupported:
            loop.remove_signal_handler(signal.SIGHUP)


class Server(NamedTuple):
    """A server, as `listening` opens and closes it.

    Attributes:
        where: The address for messages.
        remedy: Returns advice for the error with which it cannot listen there.
        start: Opens the server.
        aclose: Closes it.
        reload: Called after SIGHUP; None leaves that signal its usual effect.
        kill: Called at the second signal; None leaves that its usual effect.
    """

    where: str
    remedy: Callable[[OSError], str]
    start: Callable[[], Awaitable[object]]
    aclose: Callable[[], Awaitable[None]]
    reload: Callable[[], Awaitable[None]] | None = None
    kill: Callable[[], None] | None = None


_NO_NAME: Final = OSError(errno.EADDRNOTAVAIL, "this is no name of a host")
"""In place of the UnicodeError of a name that cannot be encoded, such as "a..b" or one with a label of 64 letters."""


@contextlib.asynccontextmanager
async def listening(server: Server) -> AsyncGenerator[asyncio.Event]:
    """Open *server*, and close it at the end of the block.

    Yield an event that the first signal sets. Raise `UsageError` if the server cannot listen.
    """
    stopped = asyncio.Event()
    with contextlib.ExitStack() as signals:
        signals.enter_context(at_signals(stopped.set, *([] if server.kill is None else [server.kill])))
        begun = None
        if server.reload is not None:
            begun = signals.enter_context(at_hangup(server.reload, stopped.set))
        try:
            await server.start()
        except (OSError, UnicodeError) as failure:
            error = failure if isinstance(failure, OSError) else _NO_NAME
            reason = f"cannot listen on {server.where}: {error.strerror or error}"
            raise UsageError(f"{reason}; {server.remedy(error)}") from None
        try:
            if begun is not None:
                begun.set()
            yield stopped
        finally:
            await server.aclose()
