"""Reads `.env` in the current directory: keys and settings that the environment does not have.

The file may be somebody else's: commands are run in folders that were cloned or unpacked. So only names of ours are taken, none that
the environment has, and addresses only together with a key from the same file, or it could have the environment's key sent elsewhere.
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
    """Add to *environment* what *path* says and it does not; a file that is missing or unreadable adds nothing.

    Args:
        path: The file: lines of NAME=VALUE, with or without `export`, quotes and comments. Names other than OPENAI_* and
            MICROBATCH_* are left alone, and so are `$` signs.
        environment: The variables; even an empty one stays as it is.
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
            note(f"microbatch: {path}: {name} is not used: addresses from this file are, together with its {KEY} only")
        else:
            environment[name] = value


def read(text: str) -> Iterator[tuple[str, str]]:
    """Yield names of ours and their values; lines that are not NAME=VALUE are skipped."""
    for line in _LINE.finditer(text.replace("\r\n", "\n")):
        name, single, double, bare = line.group("name", "single", "double", "bare")
        if double is not None:
            single = re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), double)
        yield name, single if single is not None else bare or ""
