"""The settings a run was made with, kept beside its output, so that a resumed run asks the same in the same way."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from microbatch.cli.console import UsageError

Settings = dict[str, Any]
"""Each setting by its flag. Texts are in it as digests: prompts may be confidential, and long."""


def hashed(value: object) -> str | None:
    """Return what stands for a text or a schema among the settings; None for None."""
    return None if value is None else "sha256:" + sha256(msgspec.json.encode(value)).hexdigest()


def path_beside(output: str) -> Path:
    """Return where the settings of the run into *output* are kept."""
    return Path(output + ".digest")


def keep(output: str, settings: Settings) -> None:
    """Write *settings* beside *output*, whole or not at all.

    Raises:
        UsageError: They cannot be written.
    """
    path = path_beside(output)
    draft = path.with_name(path.name + ".new")
    try:
        with draft.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from None


def differences(output: str, settings: Settings) -> dict[str, str] | None:
    """Return the settings in which the run into *output* differed from *settings*, each with words for it.

    Returns:
        None if nothing is known of that run.
    """
    try:
        kept = msgspec.json.decode(path_beside(output).read_bytes(), type=Settings)
    except (OSError, ValueError):
        return None
    names = [name for name in {**settings, **kept} if settings.get(name) != kept.get(name)]
    return {name: _told(name, kept.get(name), settings.get(name)) for name in names}


def _told(name: str, before: object, now: object) -> str:
    if any(isinstance(value, str) and value.startswith("sha256:") for value in (before, now)):
        return f"{name} (added)" if before is None else f"{name} (left out)" if now is None else f"{name} (changed)"
    return f"{name} (was {_word(before)}, is {_word(now)})"


def _word(value: object) -> str:
    return "not set" if value is None else str(value)
