"""Containment of errors raised by foreign code: validators, hooks, counters, and bugs of this package itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class contained:  # noqa: N801 used like `contextlib.suppress`
    """Context manager that keeps what its block raises, except what ends the process (`KeyboardInterrupt`, `SystemExit`).

    A panic of an extension module written in Rust derives from `BaseException` only, so `except Exception` would miss it.
    For synchronous blocks only: cancellation of a task is kept as well.

    Attributes:
        error: What the block raised; None if it ended normally.
    """

    error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.error = error
        return error is None or not isinstance(error, KeyboardInterrupt | SystemExit)
