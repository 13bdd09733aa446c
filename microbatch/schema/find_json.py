"""The JSON in the text of a reply that was asked for JSON only: past prose, code fences and thoughts around it."""

from __future__ import annotations

import contextlib
import json
import re
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from microbatch.prompt.thoughts import after_thoughts

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_TRIES = 16
"""Fenced blocks, and values in prose, that are looked at before a reply is given up."""

# No `\s*` before the lazy part: the two would share the blanks in quadratically many ways.
_FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL | re.IGNORECASE)
_BRACKET = re.compile(r"[{\[]")
_QUOTE = re.compile('"')
_scan = json.JSONDecoder().raw_decode


class _Wrapper(msgspec.Struct):
    answer: msgspec.Raw


_wrapper = msgspec.json.Decoder(_Wrapper).decode


def candidates(text: str) -> Iterator[str]:
    """Yield what may be the JSON behind any thoughts: the whole text, each fenced block, each value that starts with a bracket."""
    text = after_thoughts(text).strip().removeprefix("\ufeff")
    yield text
    for block in islice(_FENCE.finditer(text), MAX_TRIES):
        yield block[1].strip()
    # A string in prose is an answer only where there is no object that it could be a part of; a bare number never is.
    opening = _BRACKET if _BRACKET.search(text) else _QUOTE
    at = 0
    for _ in range(MAX_TRIES):  # each may read to the end of the text
        start = opening.search(text, at)
        if start is None:
            return
        try:
            _, at = _scan(text, start.start())
        except (ValueError, RecursionError):
            at = start.end()
        else:
            if at - start.start() < len(text):
                yield text[start.start() : at]


def unwrapped(raw: str) -> Iterator[str]:
    """Yield the member "answer" of *raw*, if it has one, and *raw* itself."""
    with contextlib.suppress(ValueError, RecursionError):
        yield bytes(_wrapper(raw).answer).decode()
    yield raw
