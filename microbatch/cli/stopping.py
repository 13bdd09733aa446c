"""Ctrl-C and SIGTERM end a command in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING

from microbatch.cli.console import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable(*first: Callable[[], None]) -> Generator[Callable[[], None]]:
    """Call one of *first* at each signal; at the next one cancel the running task and leave this block without an error.

    Any further signal has its usual effect.

    Yields:
        A function that cancels the task and leaves the block in the same way.
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
            _remove_handlers(loop)
        action()

    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
        for number in _SIGNALS:
            loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        _remove_handlers(loop)


def _remove_handlers(loop: asyncio.AbstractEventLoop) -> None:
    for number in _SIGNALS:
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            loop.remove_signal_handler(number)


@contextlib.asynccontextmanager
async def listening(
    args: argparse.Namespace, start: Callable[[], Awaitable[object]], aclose: Callable[[], Awaitable[None]]
) -> AsyncGenerator[asyncio.Event]:
    """Open a server on `args.host` and `args.port` with *start*, and close it with *aclose* at the end of the block.

    Yields:
        An event that the first signal sets.

    Raises:
        UsageError: The server cannot listen there.
    """
    stopped = asyncio.Event()
    with at_signals(stopped.set):
        try:
            await start()
        except OSError as error:
            raise UsageError(
                f"cannot listen on {args.host}:{args.port}: {error.strerror}; choose another --port, or 0 for a free one"
            ) from None
        try:
            yield stopped
        finally:
            await aclose()
