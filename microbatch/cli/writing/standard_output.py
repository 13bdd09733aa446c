"""The answers of a run on stdout, as they come, in place of an output file."""

from __future__ import annotations

import sys
from collections import Counter
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import TYPE_CHECKING, Any, Final, Self

import msgspec

from microbatch.cli import console
from microbatch.cli.writing.output import NotWritten, Provenance
from microbatch.cli.writing.writers import encoder, head

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.cli.writing.target import Target

MAX_AHEAD: Final = 10_000
"""Answers that wait for a slow reader, before the run does."""


class StandardOutput:
    """Stdout as the output of a run, which cannot be resumed from it. It has the part of `OutputFile` that a run needs.

    A thread does the writing: a reader that pauses must not stop the event loop, in which calls would time out.
    """

    name = None
    size = 0

    def __init__(self, target: Target) -> None:
        self.written: int = 0
        self._row = target.row
        self._encode = encoder(target.form, target.columns)
        self._head = head(target.form, target.columns)
        self._answers: Counter[Provenance] = Counter()
        self._waiting: SimpleQueue[bytes | None] = SimpleQueue()
        self._room = Semaphore(MAX_AHEAD)
        self._failure: Exception | None = None
        self._raised = False
        self._thread = Thread(target=self._write_all, name="microbatch-stdout", daemon=True)

    def begin(self) -> None:
        """Write what precedes the first answer."""
        self._thread.start()
        self._put(self._head)

    def write(self, line: dict[str, Any]) -> None:
        """Write *line* soon. Raise `NotWritten` if an earlier one could not be written."""
        self._check()
        self._put(self._encode(self._row(line)))
        self.written += 1
        if line["error"] is None and line.get("lane_kind") is not None:
            self._answers[msgspec.convert(line, Provenance)] += 1

    def count(self, wanted: Callable[[Provenance], bool]) -> int:
        """Return the number of *wanted* answers."""
        return sum(count for answer, count in self._answers.items() if wanted(answer))

    def _put(self, data: bytes) -> None:
        self._room.acquire()
        self._waiting.put(data)

    def _write_all(self) -> None:
        while (data := self._waiting.get()) is not None:
            try:
                if self._failure is None:
                    sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()
            except (OSError, ValueError) as error:
                self._failure = error
            self._room.release()

    def _check(self) -> None:
        if self._failure is not None:
            self._raised = True
            why = self._failure.strerror if isinstance(self._failure, OSError) else self._failure
            raise NotWritten(f"cannot write to stdout: {why}") from self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until all is written. Raise `NotWritten` if that failed, and `write` has not said so."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join()
        if self._failure is not None:
            console.mute(sys.stdout)
        if not self._raised:
            self._check()
