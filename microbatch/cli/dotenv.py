"""Reads `.env` in the current directory for keys and settings that the environment does not have.

The file is not trusted, because commands are run in folders that were cloned or unpacked. Only names of this package are taken, and
none that the environment has. Addresses are taken only together with a key from the same file; otherwise the file could send the
environment's key to another server.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from microbatch.cli.console import note

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

FILE: Final = ".env"
KEY: Final = "OPENAI_API_KEY"

_LINE: Final = re.compile(
    r"""^[ \t]*(?:export[ \t]+)?(?P<name>(?:OPENAI|MICROBATCH)_\w+)[ \t]*=[ \t]*
    (?:'(?P<single>[^'\n]*)'|"(?P<double>(?:\\.|[^"\\\n])*)"|(?P<bare>(?:(?<![ \t])|(?!\#))[^'"\s][^\n]*?)?)
    [ \t]*(?:(?<=\s|'|")\#[^\n]*)?$""",
    re.MULTILINE | re.VERBOSE | re.ASCII,
)
_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t"}


def load(path: str = FILE, environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the variables of the file *path* to *environment*; a file that is missing or unreadable adds nothing.

    Args:
        path: The file: lines of NAME=VALUE, with or without `export`, quotes and comments. Names other than OPENAI_* and
            MICROBATCH_* are ignored, and `$` has no meaning.
        environment: The variables; those that are set, even to an empty string, are not changed.
    """
    try:
        text = Path(path).read_text("utf-8-sig", errors="replace")
    except OSError:
        return
    found = dict(read(text))
    key = found.get(KEY)
    trusted = bool(key) and environment.get(KEY, key) == key
    for name, value in found.items():
        if name in environment:
            continue
        if "://" in value and not trusted:
            note(f"microbatch: {path}: {name} is ignored: addresses in this file are used only together with its {KEY}")
        else:
            environment[name] = value


def read(text: str) -> Iterator[tuple[str, str]]:
    """Yield the OPENAI_* and MICROBATCH_* variables in *text*; other lines are skipped."""
    for line in _LINE.finditer(text.replace("\r\n", "\n")):
        name, single, double, bare = line.group("name", "single", "double", "bare")
        if double is not None:
            single = re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), double)
        yield name, single if single is not None else bare or ""
