"""Ctrl-C and SIGTERM, turned into an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable() -> Generator[None]:
    """Cancel the running task at the first signal, and let this block swallow that; a second signal kills as usual."""
    task = asyncio.current_task()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True
        if task is not None:
            task.cancel()

    try:
        with at_first_signal(stop):
            yield
    except asyncio.CancelledError:
        if not stopped or task is None:
            raise
        task.uncancel()


@contextlib.contextmanager
def at_first_signal(stop: Callable[[], None]) -> Generator[None]:
    """Call *stop* at the first signal; a second one kills as usual.

    Without a main thread or signals to listen to, the block runs unchanged.
    """
    loop = asyncio.get_running_loop()

    def first() -> None:
        _ignore(loop)
        stop()

    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
        for number in _SIGNALS:
            loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        _ignore(loop)


def _ignore(loop: asyncio.AbstractEventLoop) -> None:
    """Give the signals back."""
    for number in _SIGNALS:
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            loop.remove_signal_handler(number)
