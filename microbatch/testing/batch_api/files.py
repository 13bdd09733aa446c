"""The files of the simulated endpoint: each belongs to the key that made it. A refusal is an `EndpointError`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from microbatch.testing.reading import EndpointError

MAX_FILE_BYTES: Final = 200 * 2**20


class StoredFile(msgspec.Struct, frozen=True):
    """A file.

    Attributes:
        owner: The key that made it.
        purpose: "batch" for what batches read, "batch_output" for what they write.
        created_at: When it was made, in seconds since 1970.
    """

    id: str
    owner: str
    name: str
    purpose: str
    content: bytes
    created_at: int

    def __repr__(self) -> str:
        """Show the id, purpose and size; neither content nor owner."""
        return f"StoredFile({self.id}, purpose={self.purpose!r}, bytes={len(self.content)})"


class Files:
    """All files of an endpoint."""

    def __init__(self) -> None:
        self._files: dict[str, StoredFile] = {}
        self._made = 0

    def add(self, owner: str, name: str, purpose: str, content: bytes) -> StoredFile:
        """Keep a file, which must not be empty or for another purpose than batches."""
        if purpose not in ("batch", "batch_output"):
            message = f"'{purpose}' is not one of ['batch'] - 'purpose'"
            raise EndpointError(400, message, param="purpose", code="invalid_value")
        if not content:
            raise EndpointError(400, "File is empty.", param="file")
        self._made += 1
        file = StoredFile(f"file-{self._made:08d}", owner, name, purpose, content, now())
        self._files[file.id] = file
        return file

    def get(self, owner: str, name: str) -> StoredFile:
        """Return the file *name* of a key; those of other keys are not there for it."""
        file = self._files.get(name)
        if file is None or file.owner != owner:
            raise EndpointError(404, f"No such File object: {name}", param="id")
        return file

    def delete(self, owner: str, name: str) -> None:
        """Forget the file *name* of a key."""
        del self._files[self.get(owner, name).id]

    def of(self, owner: str, purpose: str | None = None) -> list[StoredFile]:
        """Return the files of a key, newest first; those for one purpose, or all."""
        files = [file for file in self._files.values() if file.owner == owner and purpose in (None, file.purpose)]
        return files[::-1]


def file_object(file: StoredFile) -> dict[str, Any]:
    """Return *file* as the wire has it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": len(file.content),
        "created_at": file.created_at,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def now() -> int:
    """Return the time in seconds since 1970, as OpenAI dates what it keeps."""
    return int(datetime.now(UTC).timestamp())
