"""One batch of the simulated endpoint: how far it is, and what has come of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from microbatch.testing.batch_input import ENDPOINT
from microbatch.testing.files import now

if TYPE_CHECKING:
    from microbatch.testing.batch_input import InputError, Line

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]

OVER: Final = ("failed", "completed", "expired", "cancelled")

WINDOW_SECONDS: Final = 24 * 60 * 60

_STAMPED: Final[tuple[Status, ...]] = (
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
)


class Batch:
    """A batch.

    Attributes:
        id: Its id.
        owner: The key that made it.
        input_file_id: The file that it reads.
        metadata: What its maker keeps with it, or None.
        status: How far it is.
        stamps: When it came to each status, in seconds since 1970.
        start: Loop time at which it was made.
        size: Bytes of its input.
        total: Its lines; 0 until they have been read.
        errors: Why it failed.
        output: The lines of its output file so far.
        failures: The lines of its error file so far.
        failed: Lines that were answered with an error.
        output_file_id: That file's id, or None.
        error_file_id: That file's id, or None.
        waiting: The lines that are not answered yet, the next one last.
        expiring: How many of them will never be.
        running: Whether its lines are being answered.
        cancelled: Set once it is to be cancelled.
    """

    def __init__(self, name: str, owner: str, input_file_id: str, metadata: Any, *, size: int, start: float) -> None:
        self.id = name
        self.owner = owner
        self.input_file_id = input_file_id
        self.metadata = metadata
        self.size = size
        self.start = start
        self.created_at = now()
        self.stamps: dict[Status, int] = {}
        self.status: Status = "validating"
        self.total = 0
        self.errors: list[InputError] = []
        self.output: list[bytes] = []
        self.failures: list[bytes] = []
        self.output_file_id: str | None = None
        self.error_file_id: str | None = None
        self.waiting: list[Line] = []
        self.expiring = 0
        self.failed = 0
        self.running = False
        self.cancelled = asyncio.Event()

    def enter(self, status: Status) -> None:
        """Go on to *status*."""
        self.status = status
        self.stamps[status] = now()

    def object(self) -> dict[str, Any]:
        """Return it as the wire has it."""
        errors = None
        if self.errors:
            errors = {"object": "list", "data": [msgspec.structs.asdict(error) for error in self.errors]}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": ENDPOINT,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.created_at + WINDOW_SECONDS,
            **{f"{status}_at": self.stamps.get(status) for status in _STAMPED},
            "request_counts": {"total": self.total, "completed": len(self.output), "failed": self.failed},
            "metadata": self.metadata,
        }
