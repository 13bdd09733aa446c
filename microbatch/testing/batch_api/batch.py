"""One batch of the simulated endpoint, and the checks of the request that creates it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

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


@dataclass(eq=False)
class Batch:
    """A batch, and how far it has come."""

    id: str
    owner: str  # the key that created it
    input_file_id: str
    metadata: dict[str, str] | None
    size: int  # bytes of its input
    start: float  # loop time of its creation
    created_at: int = field(default_factory=now)
    status: Status = "validating"
    stamps: dict[Status, int] = field(default_factory=dict)  # when it entered each, in seconds since 1970
    total: int = 0  # lines; 0 until they have been read
    failed: int = 0  # lines that were answered with an error
    errors: list[InputError] = field(default_factory=list)
    output: list[bytes] = field(default_factory=list)
    failures: list[bytes] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    waiting: list[Line] = field(default_factory=list)  # unanswered lines, the next one last
    expiring: int = 0  # how many of them will never be answered
    running: bool = False
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

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
            **{f"{status}_at": self.stamps.get(status) for status in get_args(Status)[1:]},
            "request_counts": {"total": self.total, "completed": len(self.output), "failed": self.failed},
            "metadata": self.metadata,
        }


def check_request(asked: Mapping[str, Any]) -> tuple[str, dict[str, str] | None]:
    """Return the input file and the metadata that a request for a batch names.

    Raises:
        EndpointError: It is malformed, or asks for what is not supported.
    """
    file_id = asked.get("input_file_id")
    if not isinstance(file_id, str):
        raise _missing("input_file_id")
    for name, only in (("endpoint", ENDPOINT), ("completion_window", "24h")):
        if name not in asked:
            raise _missing(name)
        if asked[name] != only:
            message = f"Invalid value: {asked[name]!r}. Supported values are: '{only}'."
            raise EndpointError(400, message, param=name, code="invalid_value")
    return file_id, _checked_metadata(asked.get("metadata"))


def _missing(name: str) -> EndpointError:
    return EndpointError(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


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
