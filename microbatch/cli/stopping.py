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
def stoppable() -> Generator[Callable[[], None]]:
    """Cancel the running task at the first signal, and let this block swallow that; a second signal kills as usual.

    Yields:
        What does the same without a signal.
    """
    with _cancellable() as stop, at_signals(stop):
        yield stop


@contextlib.contextmanager
def stoppable_in_order(finish: Callable[[], None]) -> Generator[Callable[[], None]]:
    """Call *finish* at the first signal; cancel the running task at the second one, and let this block swallow that.

    A third signal kills as usual.

    Yields:
        What does the same as a second signal.
    """
    with _cancellable() as stop, at_signals(finish, stop):
        yield stop


@contextlib.contextmanager
def _cancellable() -> Generator[Callable[[], None]]:
    """Yield what cancels the running task, and let this block swallow that."""
    task = asyncio.current_task()
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if not stopped and task is not None:
            stopped = True
            task.cancel()

    try:
        yield stop
    except asyncio.CancelledError:
        if not stopped or task is None:
            raise
        task.uncancel()


@contextlib.contextmanager
def at_signals(*acts: Callable[[], None]) -> Generator[None]:
    """Call one of *acts* at each signal, in order; when there is none left, a signal kills as usual.

    Without a main thread or signals to listen to, the block runs unchanged.
    """
    loop = asyncio.get_running_loop()
    left = list(acts)

    def act() -> None:
        now = left.pop(0)
        if not left:
            _ignore(loop)
        now()

    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
        for number in _SIGNALS:
            loop.add_signal_handler(number, act)
    try:
        yield
    finally:
        _ignore(loop)


def _ignore(loop: asyncio.AbstractEventLoop) -> None:
    """Give the signals back."""
    for number in _SIGNALS:
        with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
            loop.remove_signal_handler(number)
