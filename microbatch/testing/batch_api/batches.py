"""The batches of the simulated endpoint: each belongs to the key that created it and is processed by a task of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from microbatch.testing.batch_api.files import now
from microbatch.testing.batch_api.input_file import ENDPOINT
from microbatch.testing.reading import EndpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from microbatch.testing.batch_api.files import Files
    from microbatch.testing.batch_api.input_file import InputError, Line

Status = Literal["validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"]

OVER: Final = ("failed", "completed", "expired", "cancelled")

WINDOW_SECONDS: Final = 24 * 60 * 60

_MAX_METADATA: Final = 16
_MAX_KEY_CHARS: Final = 64
_MAX_VALUE_CHARS: Final = 512

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
        owner: The key that created it.
        stamps: When it entered each status, in seconds since 1970.
        start: Loop time of its creation.
        size: Bytes of its input.
        total: Its lines; 0 until they have been read.
        errors: Why it failed.
        output: The lines of its output file so far.
        failures: The lines of its error file so far.
        failed: Lines that were answered with an error.
        waiting: Unanswered lines, the next one last.
        expiring: How many of them will never be answered.
        running: Whether its lines are being answered.
        cancelled: Set when it is to be cancelled.
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


class Batches:
    """All batches of an endpoint.

    Args:
        files: Where their inputs are.
        run: Processes a batch from where it stands to its end.
    """

    def __init__(self, files: Files, run: Callable[[Batch], Coroutine[Any, Any, None]]) -> None:
        self._files = files
        self._run = run
        self._batches: dict[str, Batch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._batches)

    def start(self) -> None:
        """Work on all batches that are not over."""
        for batch in self._batches.values():
            if batch.status not in OVER:
                self._work_on(batch)

    async def stop(self) -> None:
        """Work on none; `start` goes on where they stand."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def create(self, owner: str, asked: Mapping[str, Any]) -> Batch:
        """Make a batch and begin to work on it.

        Raises:
            EndpointError: What is *asked* for is malformed or not supported, or the file is not there for *owner*.
        """
        name = asked.get("input_file_id")
        if not isinstance(name, str):
            raise _missing("input_file_id")
        for field, only in (("endpoint", ENDPOINT), ("completion_window", "24h")):
            if field not in asked:
                raise _missing(field)
            if asked[field] != only:
                message = f"Invalid value: {asked[field]!r}. Supported values are: '{only}'."
                raise EndpointError(400, message, param=field, code="invalid_value")
        metadata = _checked_metadata(asked.get("metadata"))
        file = self._files.get(owner, name)
        if file.purpose != "batch":
            raise EndpointError(400, "The file's purpose must be 'batch'.", param="input_file_id", code="invalid_value")
        batch = Batch(
            f"batch_{len(self._batches) + 1:08d}",
            owner,
            name,
            metadata,
            size=len(file.content),
            start=asyncio.get_running_loop().time(),
        )
        self._batches[batch.id] = batch
        self._work_on(batch)
        return batch

    def get(self, owner: str, name: str) -> Batch:
        """Return a batch by its id.

        Raises:
            EndpointError: There is none, or it is another key's.
        """
        batch = self._batches.get(name)
        if batch is None or batch.owner != owner:
            raise EndpointError(404, f"No batch found with id '{name}'.")
        return batch

    def of(self, owner: str) -> list[Batch]:
        """Return the batches of a key, newest first."""
        return [batch for batch in self._batches.values() if batch.owner == owner][::-1]

    def cancel(self, owner: str, name: str) -> Batch:
        """Begin to cancel a batch, and return it.

        Raises:
            EndpointError: It is not to be found, or it is over, or nearly.
        """
        batch = self.get(owner, name)
        if batch.status in (*OVER, "finalizing"):
            raise EndpointError(409, f"Cannot cancel a batch with status '{batch.status}'.")
        if batch.status != "cancelling":
            batch.enter("cancelling")
            batch.cancelled.set()
        return batch

    def _work_on(self, batch: Batch) -> None:
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _missing(field: str) -> EndpointError:
    return EndpointError(400, f"Missing required parameter: '{field}'.", param=field, code="missing_required_parameter")


def _checked_metadata(metadata: Any) -> dict[str, str] | None:
    if metadata is None:
        return None
    try:
        kept = msgspec.convert(metadata, dict[str, str])
    except msgspec.ValidationError:
        kept = {}
    short = all(len(key) <= _MAX_KEY_CHARS and len(value) <= _MAX_VALUE_CHARS for key, value in kept.items())
    if kept != metadata or not short or len(kept) > _MAX_METADATA:
        message = (
            f"Invalid 'metadata': expected at most {_MAX_METADATA} strings of at most {_MAX_VALUE_CHARS} characters, "
            f"under keys of at most {_MAX_KEY_CHARS}."
        )
        raise EndpointError(400, message, param="metadata", code="invalid_value")
    return kept
