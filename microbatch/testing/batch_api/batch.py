"""One batch of the simulated endpoint, and the checks of the request that creates it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from microbatch.testing.batch_api.files import now
from microbatch.testing.batch_api.input_file import ENDPOINT
from microbatch.testing.reading import EndpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        size: Bytes of its input.
        start: Loop time of its creation.
        stamps: When it entered each status, in seconds since 1970.
        total: Its lines; 0 until they have been read.
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


def check_request(asked: Mapping[str, Any]) -> tuple[str, dict[str, str] | None]:
    """Return the input file and the metadata that a request for a batch names.

    Raises:
        EndpointError: It is malformed, or asks for what is not supported.
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
    return name, _checked_metadata(asked.get("metadata"))


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
