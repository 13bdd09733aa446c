"""`--api-key-command`: a key that a command prints, such as one whose keys expire."""

from __future__ import annotations

import shlex
import subprocess
from typing import TYPE_CHECKING

from microbatch.cli.console import UsageError
from microbatch.transports.api_key import KEY_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable


class KeyCommandFailed(Exception):
    """The command did not print a key; the message says why, without what it printed."""


def key_command(command: str) -> Callable[[], str]:
    """Return a function that runs *command*, without a shell, and returns what it prints, stripped.

    The command is run here already, so that one that does not work is noticed before anything is sent; the first call of the function
    returns that key. It writes its complaints to stderr. It may take as long as `OpenAIChat` waits for a key.

    Raises:
        UsageError: It cannot be run, or prints no key.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--api-key-command: {error}, in {command!r}") from None
    if not words:
        raise UsageError("--api-key-command: must name a command")
    try:
        first = [_printed_by(words)]
    except KeyCommandFailed as error:
        raise UsageError(f"--api-key-command: {error}") from None
    return lambda: first.pop() if first else _printed_by(words)


def _printed_by(words: list[str]) -> str:
    name = words[0]
    try:
        # The user's own command, from the command line.
        done = subprocess.run(  # noqa: S603
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=KEY_TIMEOUT, check=False
        )
    except OSError as error:
        raise KeyCommandFailed(f"cannot run {name!r}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise KeyCommandFailed(f"{name!r} took longer than {KEY_TIMEOUT:g} s") from None
    if done.returncode:
        raise KeyCommandFailed(f"{name!r} ended with status {done.returncode}")
    key = done.stdout.decode("utf-8", "replace").strip()
    if not key.isascii() or not key.isprintable() or not key:
        raise KeyCommandFailed(f"{name!r} printed no key: one line of printable ASCII on its standard output")
    return key
