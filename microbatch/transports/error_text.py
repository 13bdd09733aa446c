"""The part of an endpoint's words that stands in the text of an error: cut, without keys, and without quotations of the prompt."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from microbatch.errors import mask
from microbatch.messages import texts_of

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_CHARS: Final = 300
_QUOTE: Final = 12  # characters in common with the prompt from which on they count as a quotation of it
_MAX_PROMPT: Final = 262_144
_ELLIPSIS: Final = "\u2026"

_TITLE: Final = re.compile(r"(?is)<title[^>]*>(.*?)</title>")
_TAG: Final = re.compile(r"(?s)<(?:script|style)\b.*?</(?:script|style)>|<[^>]*>")
_QUOTED: Final = re.compile(r"'[^']{3,}'|\"[^\"]{3,}\"|`[^`]{3,}`")
_LETTER: Final = re.compile(r"(?<!\w)\w")


def shown(message: str, secrets: Iterable[str], asked: Iterable[Any]) -> str:
    """Return *message* on one line, masked and cut.

    Args:
        message: The endpoint's words, or an HTML page.
        secrets: What must not appear.
        asked: The contents of the messages that were sent. What the endpoint quotes of them is left out.
    """
    for secret in secrets:
        message = message.replace(secret, "***")
    if message.lstrip()[:1] == "<":
        title = _TITLE.search(message)
        message = title[1] if title else _TAG.sub(" ", message)
    message = " ".join(mask(message).split())[: 2 * MAX_CHARS]
    message = _without(message, prompt_of(asked))
    printable = "".join(char if char.isprintable() else " " for char in message)
    return printable if len(printable) <= MAX_CHARS else printable[: MAX_CHARS - 1] + _ELLIPSIS


def prompt_of(asked: Iterable[Any]) -> str:
    """Return the texts in the contents of messages on one line, as far as quotations of them are looked for."""
    return " ".join(" ".join(text for content in asked for text in texts_of(content)).split())[:_MAX_PROMPT]


def _without(message: str, prompt: str) -> str:
    """Return *message* with an ellipsis for all that it has in common with *prompt*."""
    message = _QUOTED.sub(lambda found: _ELLIPSIS if found[0][1:-1] in prompt else found[0], message)
    kept: list[str] = []
    done = 0
    for found in _LETTER.finditer(message):
        start = found.start()
        end = start + _QUOTE
        if start < done or end > len(message) or message[start:end] not in prompt:
            continue
        while end < len(message) and message[start : end + 1] in prompt:
            end += 1
        kept += [message[done:start], _ELLIPSIS]
        done = end
    return "".join([*kept, message[done:]])
