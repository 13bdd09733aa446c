"""Orders in an item's text that the simulated model follows: to reply with one exact word, and to answer for all requests."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import msgspec

from microbatch.testing.answers import json_type

if TYPE_CHECKING:
    from collections.abc import Iterable

_EXACTLY = re.compile(r"Reply with exactly: ([A-Za-z0-9]+)")
# The answer begins after the last "answer" before "for all requests".
_FOR_ALL = re.compile(r"\banswer\s+((?:(?!\banswer\b).)+?)\s+for all requests\b", re.IGNORECASE)
_QUOTES = "\"'`\u201c\u201d\u2018\u2019"


def exact_word(text: str) -> str | None:
    """Return the word that *text* asks for and nothing else, or None if it asks for anything else."""
    found = _EXACTLY.fullmatch(text)
    return found.group(1) if found else None


def answer_for_all(texts: Iterable[str]) -> str | None:
    """Return what the first of *texts* with such an order wants all requests answered with; None if none has."""
    for text in texts:
        found = _FOR_ALL.search(text)
        if found:
            return found.group(1).strip(_QUOTES)
    return None


def obeying(order: str, answer: Any) -> Any:
    """Return *answer* as it is under an order to answer *order*, as far as its kind allows.

    A string becomes the order, whether or not it is a label asked for; so do the strings inside an object or a list. Anything
    else becomes what the order says in JSON if that is of the same type, and stays as it is if not.
    """
    answer = msgspec.to_builtins(answer)
    if isinstance(answer, str):
        return order
    if isinstance(answer, dict):
        return {name: obeying(order, value) for name, value in answer.items()}
    if isinstance(answer, list):
        return [obeying(order, value) for value in answer]
    try:
        value = json.loads(order)
    except ValueError:
        return answer
    return value if json_type(value) == json_type(answer) else answer
