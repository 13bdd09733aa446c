"""The answers of a run on stdout, as they come, in place of an output file."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.cli import console
from microbatch.cli.output import NotWritten, Provenance
from microbatch.cli.writers import encoder, head

if TYPE_CHECKING:
    from collections.abc import Callable

    from microbatch.cli.target import Target


class StandardOutput:
    """Stdout as the output of a run, which cannot be resumed from it. It has the part of `OutputFile` that a run needs."""

    name = None
    size = 0

    def __init__(self, target: Target) -> None:
        self.written: int = 0
        self._row = target.row
        self._encode = encoder(target.form, target.columns)
        self._head = head(target.form, target.columns)
        self._answers: Counter[Provenance] = Counter()

    def begin(self) -> None:
        """Write what precedes the first answer. Raise `NotWritten` if that fails."""
        self._write(self._head)

    def write(self, line: dict[str, Any]) -> None:
        """Write *line*. Raise `NotWritten` if that fails."""
        self._write(self._encode(self._row(line)))
        self.written += 1
        if line["error"] is None and line.get("lane_kind") is not None:
            self._answers[msgspec.convert(line, Provenance)] += 1

    def count(self, wanted: Callable[[Provenance], bool]) -> int:
        """Return the number of *wanted* answers."""
        return sum(count for answer, count in self._answers.items() if wanted(answer))

    def _write(self, data: bytes) -> None:
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except (OSError, ValueError) as error:
            console.mute(sys.stdout)
            why = error.strerror if isinstance(error, OSError) else error
            raise NotWritten(f"cannot write to stdout: {why}") from error
