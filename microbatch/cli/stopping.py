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


@contextlib.asynccontextmanager
async def listening(
    args: argparse.Namespace, start: Callable[[], Awaitable[object]], aclose: Callable[[], Awaitable[None]]
) -> AsyncGenerator[asyncio.Event]:
    """Open a server on `args.host` and `args.port` with *start*, and close it with *aclose* at the end of the block.

    Yield an event that the first signal sets. Raise `UsageError` if the server cannot listen there.
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
